"""Names in textual inversion files: the token, and whose vectors each tensor holds.

| writer            | tensors                                               | the word         |
| ----------------- | ----------------------------------------------------- | ---------------- |
| diffusers         | one, (d,) or (n, d), named by the word                | its name         |
| kohya, web UI     | `emb_params` (n, d)                                   | the file's name  |
| kohya for SDXL    | `clip_l` (n, d) and `clip_g` (n, d), one per encoder  | the file's name  |
| the same with T5  | also `t5xxl` (ComfyUI) or `t5` (diffusers)            | the file's name  |
| web UI, .pt       | `string_to_param.*` (n, d)                            | the file's name  |
| the paper's, .pt  | the same, and the ids `string_to_token.*`             | the file's name  |
| by hand, .pt        | one, without a name (`tensor`)                        | the file's name  |
| beside a LoRA     | `bundle_emb.WORD.` before any of these names          | WORD             |
"""

import pathlib
from collections import defaultdict
from collections.abc import Iterable

PAIR = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
T5 = ("t5xxl", "t5")  # beside them
BUNDLED = "bundle_emb."
_UNNAMED = ("emb_params", "tensor", *PAIR)


def embeddings(names: Iterable[str]) -> list[str]:
    """Those of `names` that hold vectors, not ids."""
    return [name for name in names if not name.startswith("string_to_token.")]


def token_name(path: pathlib.Path, names: Iterable[str]) -> str | None:
    """The placeholder token of a file with tensors of these names; None if it is no such file."""
    found = set(embeddings(names))
    clips = found.difference(T5)
    if clips == PAIR.keys() or (len(found) == 2 and clips and clips <= PAIR.keys()):
        return path.stem
    if len(found) != 1:
        return None
    (name,) = found
    return path.stem if name in _UNNAMED or name.startswith("string_to_param.") else name


def bundled(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The embeddings that come with a LoRA: by token, the names of tensors without and with it."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        token, dot, own = name.removeprefix(BUNDLED).partition(".")
        if name.startswith(BUNDLED) and dot:
            found[token][own] = name
    return dict(found)
