"""One file with a whole model in it, or with a part of one and a base that has the rest."""

import pathlib
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.checkpoints import leftovers
from jaxdiff.checkpoints.base_folder import BaseFolder
from jaxdiff.checkpoints.clip_vocabulary import clip_tokenizer
from jaxdiff.checkpoints.components import Component, build
from jaxdiff.checkpoints.layout_registry import layout_for
from jaxdiff.checkpoints.loading import Placement, lazy_tensors
from jaxdiff.checkpoints.model_registry import MODEL_CLASSES, class_name_of
from jaxdiff.checkpoints.pipelines import PipelineComponents
from jaxdiff.checkpoints.prediction_type import stored_prediction_type
from jaxdiff.checkpoints.safetensors import LazyTensor, TensorInfo, write_tensors
from jaxdiff.checkpoints.schedulers import prediction_type_of
from jaxdiff.checkpoints.single_file_layouts import (
    ANOTHER_VAE,
    BASE,
    TEXT_ENCODERS,
    FileComponent,
    SingleFileLayout,
)
from jaxdiff.checkpoints.single_file_settings import METADATA_KEY, marker_tensors, read_layout
from jaxdiff.checkpoints.text_encoder_files import TextEncoderFile, assign
from jaxdiff.checkpoints.tokenizers import TokenizerFiles
from jaxdiff.checkpoints.tokenizers_beside import BESIDE
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.atomic import atomic_file, check_file
from jaxdiff.core.configs import prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype
from jaxdiff.core.validate import one_of
from jaxdiff.diffusion.denoising import PREDICTION_TYPES


class IncompleteFileError(InputError):
    """A file without a component that its model needs."""

    def __init__(self, path: pathlib.Path, lacking: str, expected: str) -> None:
        super().__init__(f"{path}: got no {lacking}, expected {expected}")
        self.path, self.lacking = path, lacking


def read_single_file(
    path: pathlib.Path,
    dtype: Dtype | None = None,
    *,
    prediction_type: str | None = None,
    base: BaseFolder | None = None,
    text_encoders: Sequence[TextEncoderFile] = (),
    variant: str | None = None,
    sharding: Placement = None,
    attention: str = "auto",
    only: Container[str] | None = None,
    skip: Container[str] = (),
) -> PipelineComponents:
    """The model in a single file, its family and sizes told by its tensors.

    `prediction_type` overrules what the file says, which the files of Stable Diffusion 2 do not.
    `text_encoders` are used instead of the file's own. `base` has the components that are still
    lacking, of weights the `variant` where it has it. `only` and `skip` are `read_pipeline`'s, the
    rest `read_component`'s. Raises InputError, naming the file, for anything that is missing, left
    over or unfit.
    """
    if prediction_type is not None:
        one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    entries = read_weights(path)
    layout = read_layout(path, entries, prediction_type)
    if base is not None and base.pipeline in layout.alternatives:
        layout = replace(layout, pipeline=base.pipeline)
    predicts = stored_prediction_type(layout.scheduler)
    one_of(f"{path}: prediction_type", predicts, PREDICTION_TYPES)
    wanted = [part for part in layout.components if part.name not in skip]
    stored = _stored(path, entries, layout, wanted)
    config = layout.config(layout.network, stored[layout.network.name].tensors)
    given = assign(text_encoders, layout, config)
    stored |= {p.name: _read_alone(given[p.name], p) for p in wanted if p.name in given}
    absent = _absent(path, layout, [part for part in wanted if part.name not in stored], base)
    wanted = [part for part in wanted if part not in absent]
    tokenizers = {
        part.tokenizer: _tokenizer(path, part, base, stored.get(part.name))
        for part in wanted
        if part.tokenizer is not None
    }
    options: dict[str, Any] = {"dtype": dtype, "sharding": sharding, "attention": attention}
    components: dict[str, Component] = {}
    for part in wanted:
        own = options | {"weights": only is None or part.name in only}
        if part.name in stored:
            components[part.name] = _built(stored[part.name], layout, part, **own)
        elif base is not None:
            components[part.name] = base.read(part, variant=variant, **own)
    scheduler, plain = layout.scheduler, layout.options
    if base is not None and base.pipeline == layout.pipeline:
        scheduler = base.scheduler(layout, config)
        plain = {**base.options, **plain}
    return PipelineComponents(
        components=components,
        scheduler=scheduler,
        tokenizers=tokenizers,
        class_name=layout.pipeline,
        options=plain,
        absent=tuple(
            name for part in absent for name in (part.name, part.tokenizer) if name is not None
        ),
    )


class _Stored(NamedTuple):
    """A component in a file: the file, and its tensors under the names of diffusers."""

    path: pathlib.Path
    tensors: Mapping[str, TensorInfo]


def _stored(
    path: pathlib.Path,
    entries: Mapping[str, TensorInfo],
    layout: SingleFileLayout,
    wanted: Sequence[FileComponent],
) -> dict[str, _Stored]:
    """The `wanted` components that a file has, by name; InputError for unknown tensors."""
    skipped = tuple(part.prefix for part in layout.components if part not in wanted)
    entries = {
        name: entry
        for name, entry in layout.below_prefixes(entries).items()
        if not (skipped and name.startswith(skipped))
    }
    # One without a prefix comes last, as all names begin so.
    ordered = sorted(wanted, key=lambda part: not part.prefix)
    groups = split(entries, {part.prefix: part.class_name for part in ordered})
    return {
        part.name: _Stored(path, part.read(groups[part.prefix]))
        for part in wanted
        if groups[part.prefix]
    }


def _read_alone(file: TextEncoderFile, part: FileComponent) -> _Stored:
    """The component `part` in a file of its own."""
    return _Stored(file.path, file.read(part))


def _absent(
    path: pathlib.Path,
    layout: SingleFileLayout,
    lacking: list[FileComponent],
    base: BaseFolder | None,
) -> list[FileComponent]:
    """Of the components that files are `lacking` the optional ones, which the base lacks too.

    With a warning; InputError for others that are missing.
    """
    if base is not None:
        lacking = [part for part in lacking if part.optional and base.find(part) is None]
    if not lacking:
        return []
    required = [part for part in lacking if not part.optional]
    if [part.name for part in required] == [layout.vae]:
        raise IncompleteFileError(
            path,
            f"tensors {required[0].prefix}*",
            f"a complete checkpoint, {ANOTHER_VAE}, or {BASE}",
        )
    if required:
        names = ", ".join(part.name for part in required)
        files = [TEXT_ENCODERS] if any(part.width is not None for part in required) else []
        files += [ANOTHER_VAE] if any(part.name == layout.vae for part in required) else []
        others = f", or {' and '.join(files)}" if files else ""
        raise IncompleteFileError(path, names, f"a complete checkpoint, or {BASE}{others}")
    warnings.warn(
        f"{path}: got no {', '.join(part.name for part in lacking)}: images are generated without; "
        f"{BASE} gives it, and so do {TEXT_ENCODERS}",
        stacklevel=2,
    )
    return lacking


def _tokenizer(
    path: pathlib.Path, part: FileComponent, base: BaseFolder | None, stored: _Stored | None
) -> TokenizerFiles:
    """The tokenizer of a text encoder that is `stored` in a file, or in the base (None)."""
    if stored is not None and part.pad is not None:
        return clip_tokenizer(part.pad)
    if base is not None and (stored is None or base.find(part) is not None):
        return base.tokenizer(part)
    place, beside = path if stored is None else stored.path, ""
    if (files := BESIDE.get(part.class_name)) is not None:
        if (found := files.find(place)) is not None:
            return found
        beside = f", or {files.wanted(place, str(part.tokenizer))}"
    lacking = f"{part.tokenizer}, which no single file has"
    raise IncompleteFileError(place, lacking, f"{BASE}{beside}")


def _built(
    stored: _Stored, layout: SingleFileLayout, part: FileComponent, **options: Any
) -> Component:
    """A component of a file; `options` are `components.build`'s."""
    source, config = str(stored.path), layout.config(part, stored.tensors)
    with prefix_errors(source):
        configs = MODEL_CLASSES[part.class_name].configs(config, source=source)
    module = build(part.class_name, configs, stored.tensors, sources=(source, source), **options)
    return Component(module=module)


def write_single_file(
    path: pathlib.Path, parts: PipelineComponents, *, dtype: Dtype | None = None
) -> None:
    """Write a model as one file in the original layout; it appears whole or not at all.

    `dtype` converts the weights, None keeps them. Raises InputError for a model that the layout
    cannot hold.
    """
    modules = {name: component.module for name, component in parts.components.items()}
    configs = {name: getattr(module, "config", None) for name, module in modules.items()}
    layout = layout_for(parts.class_name, configs, parts.scheduler)
    found: dict[str, LazyTensor] = {}
    if left_out := sorted(modules.keys() - {part.name for part in layout.components}):
        warnings.warn(
            f"{path}: got {', '.join(left_out)}: a single file of {layout.name} does not hold it",
            stacklevel=2,
        )
    for part in layout.components:
        module = modules.get(part.name)
        if module is None and part.optional:
            continue
        got = "none" if module is None else class_name_of(module)
        if module is None or type(module) is not MODEL_CLASSES[part.class_name].module:
            raise InputError(
                f"{part.name}: got {got}, expected {part.class_name}: a single file holds no other"
            )
        tensors = part.write(lazy_tensors(module, dtype=dtype))
        found |= {part.prefix + name: tensor for name, tensor in tensors.items()}
    found = layout.above_prefixes(found)
    none = LazyTensor(dtype=np.dtype(np.float32), shape=(0,), fetch=lambda: np.zeros(0, np.float32))
    found |= dict.fromkeys(marker_tensors(parts.scheduler, layout.scheduler), none)
    predicts = prediction_type_of(parts.scheduler).removesuffix("_prediction")
    check_file(path)
    with atomic_file(path) as temporary:
        write_tensors(temporary, found, metadata={METADATA_KEY: predicts})


def split(
    entries: Mapping[str, TensorInfo], classes: Mapping[str, str]
) -> dict[str, dict[str, TensorInfo]]:
    """The tensors below each prefix in `classes`, without it, for components of these classes.

    A warning counts those that are known to be passed over; InputError for others.
    """
    groups, passed_over, unknown = leftovers.sort_file(entries, classes)
    source = next(iter(entries.values())).path
    if unknown:
        raise InputError(
            f"{source}: unknown tensors: got {leftovers.shown(unknown)}, expected none"
        )
    leftovers.warn(source, passed_over)
    return groups
