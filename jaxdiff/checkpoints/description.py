"""What a checkpoint is, from its tables alone: no weights are read, and jax is not needed."""

import dataclasses
import math
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxdiff.checkpoints import leftovers
from jaxdiff.checkpoints.adapter_info import LoRAInfo, TextualInversionInfo, find_adapter
from jaxdiff.checkpoints.file_kinds import is_shard, text_encoder_alone
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.layout_registry import is_model
from jaxdiff.checkpoints.lora_formats import control_tensor
from jaxdiff.checkpoints.lora_names import has_weights, weights_file
from jaxdiff.checkpoints.prediction_type import stored_prediction_type
from jaxdiff.checkpoints.safetensors import TensorInfo
from jaxdiff.checkpoints.single_file_layouts import (
    ANOTHER_VAE,
    BASE,
    TEXT_ENCODERS,
    VAE_CLASSES,
    FileComponent,
    SingleFileLayout,
)
from jaxdiff.checkpoints.single_file_settings import read_layout
from jaxdiff.checkpoints.tokenizers_beside import BESIDE
from jaxdiff.checkpoints.vae_layouts import find_vae
from jaxdiff.checkpoints.weights import find_weights, read_weights
from jaxdiff.core.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentInfo:
    """One component: how many parameters it has, in which dtypes, in how many bytes."""

    name: str
    class_name: str
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]  # the most common first
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """A checkpoint in words and numbers."""

    path: str
    # "diffusers folder", "component folder", "single file", "VAE file, ... layout", "LoRA",
    # "control LoRA, not supported",
    # "textual inversion", "text encoder file", "shard", "tensors"
    layout: str
    family: str  # what pipeline or model it is, or is for
    prediction_type: str | None
    parts: tuple[ComponentInfo, ...]
    facts: LoRAInfo | TextualInversionInfo | None = None  # of a LoRA or a textual inversion
    # Of files with a whole model or a VAE:
    left_over: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by kind; not read
    unknown: tuple[str, ...] = ()  # names of tensors with which the file cannot be loaded
    missing: tuple[str, ...] = ()  # components, and tokenizers of those that are there
    optional: tuple[str, ...] = ()  # components without which it loads too
    remedies: Mapping[str, str] = dataclasses.field(default_factory=dict)  # each of these, in words

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def describe(path: pathlib.Path, *, variant: str | None = None) -> Description:
    """The description of a folder or file; InputError if it holds no weights."""
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise InputError(f"{path}: got no such file or folder, expected a checkpoint")
    if (path / "model_index.json").is_file():
        return _pipeline(path, variant)
    if not (path / "config.json").is_file() and has_weights(path):
        return _file(weights_file(path))
    config = read_object(path / "config.json") if (path / "config.json").is_file() else {}
    name = _class(config)
    part = _part(path.resolve().name, name, read_weights(find_weights(path, variant=variant)))
    return _description(path, "component folder", name, None, [part])


def _file(path: pathlib.Path) -> Description:
    entries = read_weights(path)
    if is_shard(path.name):
        part = _part("tensors", "unknown", entries)
        return _description(path, "shard", "one of several files of a component", None, [part])
    if not is_model(entries):
        if vae := find_vae(path, entries):
            part = _part("vae", vae.class_name, vae.tensors)
            family = f"VAE of {vae.latent_channels} latent channels"
            found = _description(path, f"VAE file, {vae.layout} layout", family, None, [part])
            return dataclasses.replace(found, left_over=leftovers.count(vae.passed_over))
        if addon := find_adapter(path, entries):
            parts = [_part(name, addon.layout, group) for name, group in addon.groups.items()]
            control = addon.layout == "LoRA" and control_tensor(entries) is not None
            layout = "control LoRA, not supported" if control else addon.layout
            found = _description(path, layout, addon.family, None, parts)
            return dataclasses.replace(found, facts=addon.facts)
        if kind := text_encoder_alone(entries):
            part = _part("text_encoder", kind, entries)
            return _description(path, "text encoder file", kind, None, [part])
        part = _part("tensors", "unknown", entries)
        return _description(path, "tensors", "unknown", None, [part])
    return _single_file(path, entries, read_layout(path, entries))


def _single_file(
    path: pathlib.Path, entries: Mapping[str, TensorInfo], layout: SingleFileLayout
) -> Description:
    """A file with a whole model: of each component what is loaded."""
    groups, passed_over, unknown = leftovers.sort_file(
        layout.below_prefixes(entries), layout.classes
    )
    parts = []
    for part in layout.components:
        if group := groups[part.prefix]:
            tensors = part.read(group)
            used = {entry.name for entry in tensors.values()}
            passed_over += [part.unused] * sum(entry.name not in used for entry in group.values())
            parts.append(_part(part.name, part.class_name, tensors))
    lacking = [part for part in layout.components if not groups[part.prefix]]
    predicts = stored_prediction_type(layout.scheduler)
    missing = (
        *(part.name for part in lacking if not part.optional),
        *(
            part.tokenizer
            for part in layout.components
            if part.tokenizer and part.pad is None and part not in lacking
            if part.class_name not in BESIDE or BESIDE[part.class_name].find(path) is None
        ),
    )
    optional = tuple(part.name for part in lacking if part.optional)
    remedies = {name: text for part in layout.components for name, text in _remedies(part)}
    return dataclasses.replace(
        _description(path, "single file", layout.name, predicts, parts),
        left_over=leftovers.count(passed_over),
        unknown=tuple(sorted(unknown)),
        missing=missing,
        optional=optional,
        remedies={name: remedies[name] for name in (*missing, *optional)},
    )


def _remedies(part: FileComponent) -> Iterator[tuple[str, str]]:
    """What gives a component, and its tokenizer, that a file lacks."""
    if part.class_name in VAE_CLASSES:
        yield part.name, ANOTHER_VAE
    else:
        yield part.name, BASE if part.width is None else f"{BASE}, or {TEXT_ENCODERS}"
    if part.tokenizer is not None:
        files = BESIDE.get(part.class_name)
        yield part.tokenizer, BASE if files is None else f"{BASE}, or {files.names} beside the file"


def _pipeline(folder: pathlib.Path, variant: str | None) -> Description:
    index = read_object(folder / "model_index.json")
    parts = []
    for name, value in sorted(index.items()):
        component = folder / name
        if not isinstance(value, list) or len(value) != 2 or not component.is_dir():
            continue
        if (component / "config.json").is_file():
            weights = read_weights(find_weights(component, variant=variant))
            parts.append(_part(name, str(value[1]), weights))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = read_object(scheduler) if scheduler.is_file() else {}
    listed = index.get("scheduler")
    if isinstance(listed, list) and len(listed) == 2:  # its class is what counts when loading
        config = config | {"_class_name": listed[1]}
    predicts = stored_prediction_type(config) if config else None
    family = str(index.get("_class_name", "unknown"))
    return _description(folder, "diffusers folder", family, predicts, parts)


def _class(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or ["unknown"]
    return str(config.get("_class_name") or architectures[0])


def _part(name: str, class_name: str, entries: Mapping[str, TensorInfo]) -> ComponentInfo:
    counts = Counter(f"{e.dtype} (scaled)" if e.scale else e.dtype for e in entries.values())
    return ComponentInfo(
        name=name,
        class_name=class_name,
        tensors=len(entries),
        parameters=sum(math.prod(e.shape) for e in entries.values()),
        dtypes=tuple(dtype for dtype, _ in counts.most_common()),
        nbytes=sum(e.nbytes for e in entries.values()),
    )


def _description(
    path: pathlib.Path,
    layout: str,
    family: str,
    predicts: str | None,
    parts: Iterable[ComponentInfo],
) -> Description:
    return Description(
        path=str(path),
        layout=layout,
        family=family,
        prediction_type=predicts,
        parts=tuple(parts),
    )
