"""Names in textual inversion files: the token, and whose vectors each tensor holds.

| writer            | tensors                                               | the word         |
| ----------------- | ----------------------------------------------------- | ---------------- |
| diffusers         | one, (d,) or (n, d), named by the word                | its name         |
| kohya, web UI     | `emb_params` (n, d)                                   | the file's name  |
| kohya for SDXL    | `clip_l` (n, d) and `clip_g` (n, d), one per encoder  | the file's name  |
| web UI, .pt       | `string_to_param.*` (n, d)                            | the file's name  |
"""

import pathlib
from collections.abc import Iterable

PAIR = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_UNNAMED = ("emb_params", "string_to_param.*")


def token_name(path: pathlib.Path, names: Iterable[str]) -> str | None:
    """The placeholder token of a file with tensors of these names; None if it is no such file."""
    names = set(names)
    if names == PAIR.keys():
        return path.stem
    if len(names) != 1:
        return None
    (name,) = names
    return path.stem if name in _UNNAMED else name
