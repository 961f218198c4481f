"""Text encoders in files of their own, as ComfyUI has them: T5, CLIP-L and OpenCLIP bigG.

Names are those of transformers, bare or below `text_encoders.NAME.transformer.`, where a whole
model has them too. Class and width are those of the tensors, and say which component of a model a
file becomes. No jax here.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdiff.checkpoints.file_kinds import TEXT_PREFIX, is_shard, text_encoder_alone
from jaxdiff.checkpoints.infer_config import tensor_shape
from jaxdiff.checkpoints.jsonfiles import parse_object
from jaxdiff.checkpoints.layout_parts import EMBEDDING, PROJECTION, clip, t5_from_file
from jaxdiff.checkpoints.safetensors import TensorInfo
from jaxdiff.checkpoints.single_file_layouts import FileComponent, SingleFileLayout
from jaxdiff.checkpoints.tokenizers import CLASSES, WHOLE, TokenizerFiles, read_file
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.errors import InputError

T5, CLIP = "T5EncoderModel", "CLIPTextModel"
TOKENIZER = "T5Tokenizer"  # which no file of tensors has; CLIP's is in the package
VOCABULARY = CLASSES[TOKENIZER][0]
TITLES = {T5: "T5", CLIP: "CLIP"}
# A bias for each layer, where T5 has one for all.
_UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
_EMBEDDINGS = {T5: EMBEDDING, CLIP: "text_model.embeddings.token_embedding.weight"}


@dataclass(frozen=True, kw_only=True)
class TextEncoderFile:
    """A text encoder that is found, its weights not read yet."""

    path: pathlib.Path
    class_name: str  # T5, or CLIP with or without a projection
    width: int  # of its states
    tensors: Mapping[str, TensorInfo]  # by the names of transformers

    def read(self, part: FileComponent) -> dict[str, TensorInfo]:
        """The tensors of the component that it becomes."""
        found = (part.alone or part.read)(self.tensors)
        if part.class_name == CLIP:  # which has none, though most files do
            found.pop(PROJECTION, None)
        return found


def open_text_encoders(paths: Iterable[str | pathlib.Path]) -> list[TextEncoderFile]:
    """The text encoders in these files; InputError for a file that has none."""
    return [found for path in paths for found in _open(pathlib.Path(path))]


def assign(
    files: Sequence[TextEncoderFile], layout: SingleFileLayout, network: Mapping[str, Any]
) -> dict[str, TextEncoderFile]:
    """The file of each component of a layout, whose network has the config `network`.

    Raises InputError for a file that fits none, and for two of one component.
    """
    found: dict[str, TextEncoderFile] = {}
    for file in files:
        part = next((p for p in _text_parts(layout) if _fits(file, p, layout, network)), None)
        if part is None:
            raise InputError(
                f"text_encoders: got {file.path} ({TITLES[file.class_name]} of width "
                f"{file.width}), expected {_expected(layout, network)}"
            )
        if part.name in found:
            raise InputError(
                f"text_encoders: got {found[part.name].path} and {file.path} for {part.name}, "
                "expected one of them"
            )
        found[part.name] = file
    for parts in _sharing(layout):
        widths = [found[part.name].width for part in parts if part.name in found]
        total = network[str(parts[0].width)]
        if len(widths) == len(parts) and sum(widths) != total:
            names = " and ".join(str(found[part.name].path) for part in parts)
            raise InputError(
                f"text_encoders: got {names} of widths {' and '.join(map(str, widths))}, expected "
                f"widths that add up to {total}, as the network has"
            )
    return found


def tokenizer_beside(path: pathlib.Path) -> TokenizerFiles | None:
    """T5's tokenizer in the folder of a file with T5: of spiece.model, else of tokenizer.json.

    None if neither is there. Settings do not count, as they can be those of another tokenizer.
    Raises InputError for a tokenizer.json of one.
    """
    found = next((each for each in _vocabularies(path) if each.is_file()), None)
    if found is None:
        return None
    data = read_file(found)
    if found.name == WHOLE:
        model = parse_object(data, str(found)).get("model")
        kind = model.get("type") if isinstance(model, dict) else None
        if kind != "Unigram":
            raise InputError(f"{found}: got a tokenizer of kind {kind!r:.40}, expected T5's")
    return TokenizerFiles(class_name=TOKENIZER, files={found.name: data})


def tokenizer_wanted(path: pathlib.Path, name: str) -> str:
    """What has T5's tokenizer, in words: a file of the component `name`, beside that at `path`."""
    place, other = _vocabularies(path)
    return (
        f"T5's {place.name} at {place} (0.8 MB: {name}/{place.name} of the model's diffusers "
        f"repository; {other.name} of that folder serves too)"
    )


def text_encoder_files(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The file of a text encoder, with those of a tokenizer beside it."""
    own = pathlib.Path(path)
    return [own, *(each for each in _vocabularies(own) if each.is_file())]


def _vocabularies(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    return tuple(path.with_name(name) for name in (VOCABULARY, WHOLE))


def _open(path: pathlib.Path) -> list[TextEncoderFile]:
    """The text encoders of a file, which has one, or several below prefixes."""
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"text_encoders: got {path} ({got}), expected files with text encoders")
    if is_shard(path.name):
        raise InputError(
            f"text_encoders: got {path}, one of several files, expected the .index.json beside it"
        )
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, entry in read_weights(path).items():
        prefix = match[0] if (match := TEXT_PREFIX.match(name)) else ""
        groups.setdefault(prefix, {})[name.removeprefix(prefix)] = entry
    if len(groups) > 1:
        groups.pop("", None)  # all else of a whole model
    found = [_text_encoder(path, group) for group in groups.values()]
    if not found or None in found:
        raise InputError(
            f"text_encoders: got {path}, in which there is no text encoder in the names of "
            "transformers, expected T5 or CLIP"
        )
    return [each for each in found if each is not None]


def _text_encoder(path: pathlib.Path, entries: Mapping[str, TensorInfo]) -> TextEncoderFile | None:
    """The text encoder with these tensors; None for others, InputError for UMT5."""
    if _UMT5 in entries:
        raise InputError(f"text_encoders: got {path} (UMT5), expected T5 v1.1 or CLIP")
    if text_encoder_alone(entries) == T5:
        name, tensors = T5, t5_from_file(entries)
    else:
        name, tensors = CLIP, clip(entries, class_name=CLIP)
        if text_encoder_alone(tensors) != CLIP:
            return None
    width = tensor_shape(tensors, _EMBEDDINGS[name], 2)[1]
    return TextEncoderFile(path=path, class_name=name, width=width, tensors=tensors)


def _text_parts(layout: SingleFileLayout) -> list[FileComponent]:
    """The text encoders of a layout that can have files of their own."""
    return [part for part in layout.components if part.width is not None]


def _kind(part: FileComponent) -> str:
    return T5 if part.class_name == T5 else CLIP


def _sharing(layout: SingleFileLayout) -> list[list[FileComponent]]:
    """The text encoders of each kind whose outputs the network takes in one place."""
    groups: dict[tuple[str, str | None], list[FileComponent]] = {}
    for part in _text_parts(layout):
        groups.setdefault((_kind(part), part.width), []).append(part)
    return list(groups.values())


def _fits(
    file: TextEncoderFile, part: FileComponent, layout: SingleFileLayout, network: Mapping[str, Any]
) -> bool:
    """Whether a file can be a component.

    Where outputs of two stand side by side, as those of CLIP-L and bigG, the first is the narrower.
    """
    if file.class_name != _kind(part):
        return False
    total = network[str(part.width)]
    (together,) = (parts for parts in _sharing(layout) if part in parts)
    if len(together) == 1:
        return file.width == total
    return file.width < total and (2 * file.width < total) == (part is together[0])


def _expected(layout: SingleFileLayout, network: Mapping[str, Any]) -> str:
    """What the text encoders of a model are, in words."""
    texts = []
    for parts in _sharing(layout):
        names = " and ".join(part.name for part in parts)
        what = TITLES[_kind(parts[0])]
        total = network[str(parts[0].width)]
        one = len(parts) == 1
        texts.append(
            f"{what} of width {total} for {names}"
            if one
            else f"{what} of two widths that add up to {total} for {names}"
        )
    return ", ".join(texts) or f"none for a file of {layout.name}"
