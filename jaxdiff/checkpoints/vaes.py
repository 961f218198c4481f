"""VAEs of their own, in a folder or a file of any layout, and models that get one."""

import pathlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxdiff.checkpoints import infer_config, layout_flux, layout_sd3, ldm_writer, leftovers
from jaxdiff.checkpoints.components import (
    CONFIG,
    Component,
    build,
    config_class,
    write_component,
)
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.layout_stable_diffusion import SD1, SDXL
from jaxdiff.checkpoints.loading import Placement, lazy_tensors
from jaxdiff.checkpoints.model_registry import MODEL_CLASSES
from jaxdiff.checkpoints.pipelines import (
    INDEX,
    VAE_COMPONENT,
    VAE_COMPONENTS,
    PipelineComponents,
    vae_component,
)
from jaxdiff.checkpoints.safetensors import TensorInfo, write_tensors
from jaxdiff.checkpoints.vae_layouts import find_vae
from jaxdiff.checkpoints.weights import STEMS, find_weights, read_weights, variants
from jaxdiff.core.atomic import atomic_file, check_file
from jaxdiff.core.configs import prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype
from jaxdiff.core.validate import one_of
from jaxdiff.models.vae import AutoencoderKL

CLASSES = ("AutoencoderKL", "AutoencoderTiny")
# Fields of a config that say how latents are scaled for the network.
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
# Each with latents of its own, whose scaling factor nearly tells which they are.
LATENTS = (SD1, SDXL, layout_sd3.LAYOUT, layout_flux.DEV)
PIXELS = 512  # sample_size of a VAE whose file does not say it; informative


@dataclass(frozen=True, kw_only=True)
class VAESource:
    """A VAE that is found, its weights not read yet."""

    path: pathlib.Path
    class_name: str
    tensors: Mapping[str, TensorInfo]
    weights: pathlib.Path
    config: Mapping[str, Any] | None = None  # its config.json, if there is one

    def read(
        self,
        dtype: Dtype | None = None,
        *,
        scaling: Mapping[str, Any],
        sharding: Placement = None,
        weights: bool = True,
    ) -> Component:
        """The VAE, where it says no scaling factor with the fields `scaling`.

        The other options are those of `components.build`. Raises InputError.
        """
        place = str(self.path if self.config is None else self.path / CONFIG)
        if self.config is not None:
            raw = self.config
        elif self.class_name == "AutoencoderKL":
            raw = infer_config.vae_fields(self.tensors) | {"sample_size": PIXELS}
        else:
            raw = infer_config.tiny_vae_fields(self.tensors)
        if self.class_name == "AutoencoderKL" and "scaling_factor" not in raw:
            raw = {**raw, **scaling}
        with prefix_errors(place):
            configs = MODEL_CLASSES[self.class_name].configs(raw, source=place)
        module = build(
            self.class_name,
            configs,
            self.tensors,
            sources=(place, str(self.weights)),
            dtype=dtype,
            sharding=sharding,
            weights=weights,
        )
        return Component(module=module, config=self.config or {})


def open_vae(path: pathlib.Path, *, variant: str | None = None) -> VAESource:
    """The VAE of a folder or file: of its own, or that of a whole model; InputError for none.

    `variant` picks weights where a folder has them. What the config.json beside a file of weights
    says, as folders of diffusers have it, counts.
    """
    folder, weights = (_folder(path), None) if path.is_dir() else (path.parent, path)
    if weights is not None:
        stems = [stem for names in STEMS.values() for stem in names if stem.startswith("diff")]
        if not path.name.startswith(tuple(stems)) or not (folder / CONFIG).is_file():
            found = find_vae(path, read_weights(path))
            if found is None:
                raise InputError(f"vae: got {path}, in which there is none, expected a VAE")
            leftovers.warn(path, found.passed_over)
            return VAESource(
                path=path, class_name=found.class_name, tensors=found.tensors, weights=path
            )
    config = read_object(folder / CONFIG)
    source = str(folder / CONFIG)
    name = config_class(config, source).removeprefix("Flax")
    one_of(f"{source}: class of the VAE", name, CLASSES)
    if weights is None:
        weights = find_weights(folder, variant=variant if variant in variants(folder) else None)
    return VAESource(
        path=folder,
        class_name=name,
        tensors=read_weights(weights),
        weights=weights,
        config=config,
    )


def is_vae(path: pathlib.Path) -> bool:
    """Whether a folder or file is a VAE alone; InputError for half a TAESD."""
    if path.is_file():
        entries = read_weights(path)
        whole = any(name.startswith("model.diffusion_model.") for name in entries)
        return not whole and find_vae(path, entries) is not None
    if (path / INDEX).is_file() or not (path / CONFIG).is_file():
        return False
    return str(read_object(path / CONFIG).get("_class_name")).removeprefix("Flax") in CLASSES


def _folder(path: pathlib.Path) -> pathlib.Path:
    """The folder of the VAE in a folder of its own or of a whole model."""
    for folder in (*(path / n for n in (VAE_COMPONENT, *VAE_COMPONENTS.values())), path):
        if (folder / CONFIG).is_file():
            return folder
    raise InputError(f"vae: got {path} without {VAE_COMPONENT}/ or {CONFIG}, expected a VAE")


def with_vae(
    parts: PipelineComponents,
    vae: VAESource,
    dtype: Dtype | None = None,
    *,
    model: pathlib.Path,
    sharding: Placement = None,
    weights: bool = True,
) -> PipelineComponents:
    """The pipeline `parts`, read from `model`, with another VAE; InputError for one that is unfit.

    Where its files do not say how latents are scaled, they are scaled as the model's own VAE does
    it, or those of the model's family.
    """
    name, scaling = vae_component(parts.class_name), _scaling(parts.class_name, model)
    component = vae.read(dtype, scaling=scaling, sharding=sharding, weights=weights)
    config: Any = component.module.config  # pyright: ignore[reportAttributeAccessIssue]
    network, channels = _denoised_channels(parts)
    if config.latent_channels != channels:
        raise InputError(
            f"vae: got {vae.path} with {config.latent_channels} latent channels, expected "
            f"{channels} as the {network} has"
        )
    if vae.class_name == "AutoencoderTiny" and scaling.get("latents_mean"):
        raise InputError(
            f"vae: got a TAESD, {vae.path}, for a model whose latents are shifted by latents_mean, "
            "expected an AutoencoderKL"
        )
    factor, expected = config.scaling_factor, scaling["scaling_factor"]
    if factor in {layout.scaling_factor for layout in LATENTS} - {expected}:
        warnings.warn(
            f"vae: {vae.path} scales latents by {factor}, another family's factor, expected "
            f"{expected} as the model has; images may be wrong",
            stacklevel=2,
        )
    return replace(
        parts,
        components={**parts.components, name: component},
        absent=tuple(each for each in parts.absent if each != name),
    )


def _denoised_channels(parts: PipelineComponents) -> tuple[str, int]:
    """The network that denoises in words, and the channels of the latents that it does so with."""
    if "unet" in parts.components:
        unet: Any = parts.components["unet"].module
        return "UNet", unet.config.channels[1]
    transformer: Any = parts.components["transformer"].module
    return "transformer", transformer.config.channels[1]


def _scaling(class_name: str, model: pathlib.Path) -> dict[str, Any]:
    """How the network of a model has its latents scaled."""
    usual = SDXL if "XL" in class_name else SD1
    for module, layout in ((layout_sd3, layout_sd3.LAYOUT), (layout_flux, layout_flux.DEV)):
        usual = layout if class_name in module.PIPELINES else usual
    own = model / vae_component(class_name) / CONFIG
    config = read_object(own) if own.is_file() else {}
    if "scaling_factor" in config:
        return {name: config[name] for name in SCALING if name in config}
    return {name: value for name, value in usual.fields["vae"].items() if name in SCALING}


def write_vae(
    path: pathlib.Path, component: Component, *, dtype: Dtype | None = None, layout: str
) -> None:
    """Write a VAE as a folder of "diffusers" or "flax", or as one file, "original" with bare names.

    `dtype` converts the weights, None keeps them. InputError for a TAESD that is not for diffusers.
    """
    if layout == "diffusers":
        write_component(path, component, dtype=dtype)
        return
    if not isinstance(component.module, AutoencoderKL):
        raise InputError(f"format: got {layout} for a TAESD, expected diffusers (a folder)")
    if layout == "flax":
        write_component(path, component, dtype=dtype, flax=True)
        return
    tensors = ldm_writer.vae_to_ldm(lazy_tensors(component.module, dtype=dtype))
    check_file(path)
    with atomic_file(path) as temporary:
        write_tensors(temporary, tensors)
