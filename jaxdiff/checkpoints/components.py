"""Component folders of diffusers and transformers (config.json and weights) as modules."""

import pathlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxdiff.checkpoints import flax_layout
from jaxdiff.checkpoints.configs import updated
from jaxdiff.checkpoints.jsonfiles import read_object, write_object
from jaxdiff.checkpoints.loading import (
    Placement,
    lazy_tensors,
    load_into,
    match_keys,
    stored_dtype,
)
from jaxdiff.checkpoints.model_registry import (
    MODEL_CLASSES,
    Configs,
    ModelClass,
    arguments,
    class_name_of,
    fields,
    present_name,
)
from jaxdiff.checkpoints.safetensors import FLOAT8, FLOATS, LazyTensor, TensorInfo, write_tensors
from jaxdiff.checkpoints.weights import find_weights, read_weights
from jaxdiff.core.atomic import atomic_folder
from jaxdiff.core.configs import prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype
from jaxdiff.core.validate import one_of
from jaxdiff.models.build import abstract

CONFIG = "config.json"
STALE = ("*.safetensors", "*.safetensors.index*.json")  # weights of a folder that is replaced


@dataclass(frozen=True, kw_only=True)
class Component:
    """A module, and the config.json that it came with, for what only other programs read in it."""

    module: nnx.Module
    config: Mapping[str, Any] = field(default_factory=dict)


def read_component(
    folder: pathlib.Path,
    *,
    class_name: str | None = None,
    dtype: Dtype | None = None,
    variant: str | None = None,
    sharding: Placement = None,
    attention: str = "auto",
) -> Component:
    """The module in a component folder, its weights on the device(s) in `dtype`.

    `class_name` overrules the config's; `dtype` None keeps the stored dtypes and computes in the
    most common one; `variant` picks among several weight files; `sharding` places the weights (see
    `loading.fill`). Raises InputError, naming the file, for anything missing, broken or unknown.
    """
    source = folder / CONFIG
    kind, configs, raw = _read_config(folder, class_name)
    weights_file = find_weights(folder, variant=variant)
    module = build(
        kind.name,
        configs,
        read_weights(weights_file),
        sources=(str(source), str(weights_file)),
        dtype=dtype,
        sharding=sharding,
        attention=attention,
    )
    return Component(module=module, config=raw)


def abstract_component(
    folder: pathlib.Path, *, class_name: str | None = None, **options: Any
) -> nnx.Module:
    """The module in a component folder as shapes; `options` are its own. InputError as above."""
    kind, configs, _ = _read_config(folder, class_name)
    with prefix_errors(str(folder / CONFIG)):
        return abstract(kind.module, *configs, **kind.options, **options)


def shape_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `read_component`'s options that a module has which is shapes alone."""
    dtype = options.get("dtype")
    return {} if dtype is None else {"dtype": dtype, "param_dtype": dtype}


def _read_config(
    folder: pathlib.Path, class_name: str | None
) -> tuple[ModelClass, Configs, dict[str, Any]]:
    """The class of a component, what its module is built from, and its config.json."""
    source = folder / CONFIG
    raw = read_object(source)
    name = config_class(raw, str(source)) if class_name is None else class_name
    kind = MODEL_CLASSES[one_of(f"{source}: class", present_name(name), MODEL_CLASSES)]
    with prefix_errors(str(source)):
        return kind, kind.configs(raw, source=str(source)), raw


def build(
    class_name: str,
    configs: Configs,
    entries: Mapping[str, TensorInfo],
    *,
    sources: tuple[str, str],
    dtype: Dtype | None = None,
    sharding: Placement = None,
    attention: str = "auto",
    weights: bool = True,
) -> nnx.Module:
    """The module of a class in KINDS with the stored tensors `entries`, as `read_component` says.

    `sources` say where the configs and where the tensors are from, for errors. Without `weights`
    the module has shapes, and no tensor is read.
    """
    kind = MODEL_CLASSES[class_name]
    compute = _commonest(entries) if dtype is None else dtype
    with prefix_errors(sources[0]):
        module = abstract(
            kind.module,
            *configs,
            dtype=compute,
            param_dtype=compute,
            attention=attention,
            **kind.options,
        )
    if not weights:
        match_keys(module, entries, class_name=class_name, source=sources[1])
        return module
    return load_into(
        module,
        entries,
        class_name=class_name,
        source=sources[1],
        dtype=dtype,
        float8_as=compute,
        sharding=sharding,
    )


def write_component(
    folder: pathlib.Path,
    component: Component,
    *,
    dtype: Dtype | None = None,
    flax: bool = False,
) -> None:
    """Write a component folder that diffusers or transformers loads; whole or not at all.

    `dtype` and `flax` are those of `write_files`. A component folder in its place is replaced.
    """
    with atomic_folder(folder, marker=CONFIG, stale=STALE) as new:
        write_files(new, component, dtype=dtype, flax=flax)


def write_files(
    folder: pathlib.Path,
    component: Component,
    *,
    dtype: Dtype | None = None,
    flax: bool = False,
) -> None:
    """Write config.json and weights, in PyTorch's layout or legacy Flax's, into `folder`.

    `dtype` converts the weights, None keeps them.
    """
    module = component.module
    kind = MODEL_CLASSES[class_name_of(module)]
    tensors = lazy_tensors(module, dtype=dtype)
    config = _config(kind, component, tensors)
    if flax:
        if kind.library == "diffusers":
            config["_class_name"] = flax_layout.PREFIX + kind.name
        weights_file = folder / f"{flax_layout.STEMS[kind.library]}.msgpack"
        flax_layout.write_flax(weights_file, module, class_name=kind.name, dtype=dtype)
    else:
        write_tensors(folder / f"{kind.stem}.safetensors", tensors)
    write_object(folder / CONFIG, config)


def _config(
    kind: ModelClass, component: Component, tensors: Mapping[str, LazyTensor]
) -> dict[str, Any]:
    """The config.json of a component: as it was read, with what has changed since."""
    raw = component.config
    now = fields(arguments(component.module))
    before = fields(kind.configs(raw, source=CONFIG)) if raw else {}
    config = updated(raw, now, before) | kind.identity
    if kind.library == "transformers":
        # What transformers loads the weights in; older versions read the first spelling only.
        commonest = Counter(str(t.dtype) for t in tensors.values()).most_common(1)[0][0]
        config["dtype" if "dtype" in raw else "torch_dtype"] = commonest
    return config


def config_class(raw: Mapping[str, Any], source: str) -> str:
    """The class that a config.json names, as diffusers or transformers writes it."""
    architectures = raw.get("architectures") or [None]
    name = raw.get("_class_name") or (architectures[0] if isinstance(architectures, list) else None)
    if not isinstance(name, str):
        raise InputError(f"{source}: got no class, expected _class_name or architectures")
    return name


def _commonest(entries: Mapping[str, TensorInfo]) -> Dtype:
    """The floating dtype of more than 8 bits that most of the stored tensors have.

    bfloat16, which holds all 8-bit floats, if there are only these; float32 if none is floating.
    """
    dtypes = Counter(e.dtype for e in entries.values() if e.dtype in FLOATS)
    if not dtypes:
        eight = any(e.dtype in FLOAT8 for e in entries.values())
        return jnp.bfloat16 if eight else jnp.float32
    common = dtypes.most_common(1)[0][0]
    return stored_dtype(next(e for e in entries.values() if e.dtype == common))
