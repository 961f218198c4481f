"""One file with a whole pipeline in it, in the original layout (LDM, A1111, Civitai)."""

import functools
import pathlib
from collections.abc import Callable, Container, Mapping

import numpy as np
from flax import nnx

from jaxdiff.checkpoints import infer_config, ldm_reader, ldm_writer, leftovers
from jaxdiff.checkpoints.clip_vocabulary import clip_tokenizer
from jaxdiff.checkpoints.components import Component, build
from jaxdiff.checkpoints.key_aliases import canonical
from jaxdiff.checkpoints.loading import Placement, lazy_tensors
from jaxdiff.checkpoints.model_registry import class_name_of
from jaxdiff.checkpoints.pipelines import VAE_COMPONENT, PipelineComponents
from jaxdiff.checkpoints.prediction_type import stored_prediction_type
from jaxdiff.checkpoints.safetensors import LazyTensor, TensorInfo, write_tensors
from jaxdiff.checkpoints.schedulers import prediction_type_of
from jaxdiff.checkpoints.single_file_layouts import (
    ANOTHER_VAE,
    UNET,
    VAE,
    SingleFileLayout,
    TextEncoderLayout,
    layout_for,
)
from jaxdiff.checkpoints.single_file_settings import METADATA_KEY, marker_tensors, read_layout
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.atomic import atomic_file, check_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype
from jaxdiff.core.validate import one_of
from jaxdiff.diffusion.denoising import PREDICTION_TYPES
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.vae import AutoencoderKL

Build = Callable[..., nnx.Module]  # (class, configs, tensors): `components.build`, the rest chosen


def read_single_file(
    path: pathlib.Path,
    dtype: Dtype | None = None,
    *,
    prediction_type: str | None = None,
    sharding: Placement = None,
    attention: str = "auto",
    only: Container[str] | None = None,
    skip: Container[str] = (),
) -> PipelineComponents:
    """The pipeline in a file of the original layout, its family and sizes told by its tensors.

    `prediction_type` overrules what the file says, which the files of Stable Diffusion 2 do not.
    `only` and `skip` are `read_pipeline`'s, the rest `read_component`'s. Raises InputError, naming
    the file, for anything that is missing, left over or unfit.
    """
    if prediction_type is not None:
        one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    entries = read_weights(path)
    layout = read_layout(path, entries, prediction_type)
    predicts = stored_prediction_type(layout.scheduler)
    one_of(f"{path}: prediction_type", predicts, PREDICTION_TYPES)
    classes = layout.classes
    if VAE_COMPONENT in skip:
        del classes[VAE]
        entries = {name: entry for name, entry in entries.items() if not name.startswith(VAE)}
    groups = split(entries, classes)

    def make(name: str) -> Build:
        return functools.partial(
            build,
            sources=(str(path), str(path)),
            dtype=dtype,
            sharding=sharding,
            attention=attention,
            weights=only is None or name in only,
        )

    modules = {"unet": _unet(groups[UNET], layout, make("unet"))}
    if VAE in groups:
        modules[VAE_COMPONENT] = _vae(groups[VAE], layout, make(VAE_COMPONENT))
    for part in layout.texts:
        modules[part.name] = _text(groups[part.prefix], part, make(part.name))
    nine = groups[UNET]["input_blocks.0.0.weight"].shape[1:2] == (9,)
    return PipelineComponents(
        components={name: Component(module=module) for name, module in modules.items()},
        scheduler=layout.scheduler,
        tokenizers={part.tokenizer: clip_tokenizer(part.pad) for part in layout.texts},
        class_name=layout.inpainting if nine else layout.pipeline,
        options=layout.options,
    )


def write_single_file(
    path: pathlib.Path, parts: PipelineComponents, *, dtype: Dtype | None = None
) -> None:
    """Write a pipeline as one file in the original layout; it appears whole or not at all.

    `dtype` converts the weights, None keeps them. Raises InputError for a model that the layout
    cannot hold.
    """
    modules = {name: component.module for name, component in parts.components.items()}
    acts = {
        name: module.config.hidden_act
        for name, module in modules.items()
        if isinstance(module, CLIPTextModel)
    }
    layout = layout_for(parts.class_name, acts, parts.scheduler)
    tensors = {name: lazy_tensors(module, dtype=dtype) for name, module in modules.items()}
    spelled = ldm_writer.unet_to_ldm_keys(tensors["unet"])
    found = {UNET + spelled[name]: tensor for name, tensor in tensors["unet"].items()}
    if not isinstance(modules[VAE_COMPONENT], AutoencoderKL):
        raise InputError(
            f"vae: got {class_name_of(modules[VAE_COMPONENT])}, expected AutoencoderKL: a single "
            "file holds no other"
        )
    found |= {VAE + k: t for k, t in ldm_writer.vae_to_ldm(tensors["vae"]).items()}
    for part in layout.texts:
        name = part.name if part.name in tensors else "text_encoder"
        text = ldm_writer.clip_to_open_clip(tensors[name]) if part.open_clip else tensors[name]
        found |= {part.prefix + key: tensor for key, tensor in text.items()}
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

    A warning counts those that are known to be passed over; InputError for others, and for a prefix
    without tensors.
    """
    groups, passed_over, unknown = leftovers.sort_file(entries, classes)
    source = next(iter(entries.values())).path
    if unknown:
        raise InputError(
            f"{source}: unknown tensors: got {leftovers.shown(unknown)}, expected none"
        )
    for prefix, group in groups.items():
        if not group:
            other = f", or {ANOTHER_VAE}" if prefix == VAE else ""
            raise InputError(
                f"{source}: got no tensors {prefix}*, expected a complete checkpoint{other}"
            )
    leftovers.warn(source, passed_over)
    return groups


def _unet(group: Mapping[str, TensorInfo], layout: SingleFileLayout, make: Build) -> nnx.Module:
    tensors = ldm_reader.unet_from_ldm(group)
    config = infer_config.unet_config(tensors, heads=layout.heads, sample_size=layout.sample_size)
    return make("UNet2DConditionModel", (config,), tensors)


def _vae(group: Mapping[str, TensorInfo], layout: SingleFileLayout, make: Build) -> nnx.Module:
    tensors = ldm_reader.vae_from_ldm(group)
    config = infer_config.vae_config(
        tensors, scaling_factor=layout.scaling_factor, sample_size=8 * layout.sample_size
    )
    return make("AutoencoderKL", (config,), tensors)


def _text(group: Mapping[str, TensorInfo], part: TextEncoderLayout, make: Build) -> nnx.Module:
    if part.open_clip:
        tensors = ldm_reader.clip_from_open_clip(group, depth=part.depth)
    else:
        names = {name: canonical(name, class_name=part.class_name) for name in group}
        tensors = {new: group[name] for name, new in names.items() if new is not None}
    config = infer_config.text_config(
        tensors, hidden_act=part.hidden_act, projection_dim=part.projection_dim
    )
    return make(part.class_name, (config,), tensors)
