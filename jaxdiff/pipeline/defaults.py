"""A model's default options: those stored with it, and those that its scheduler config reveals."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxdiff.checkpoints.configs import native_sample_size
from jaxdiff.checkpoints.pipelines import PipelineComponents
from jaxdiff.checkpoints.schedulers import clipping_of, prediction_type_of, sampler_name
from jaxdiff.core.configs import from_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.families.base import Family
from jaxdiff.guidance.base import parse
from jaxdiff.pipeline.request import check_options

# Defaults of pipeline classes of diffusers for networks that nothing else tells apart.
DEFAULTS_OF_CLASSES = {"LatentConsistencyModelPipeline": {"guidance_scale": 8.5, "steps": 4}}
# Of step-distilled models that nothing but a word in the name of their file or folder tells from
# the others of a family: Stable Diffusion 3.5 Large Turbo has the tensors and schedule of Large.
DEFAULTS_OF_NAMES = {
    "Stable Diffusion 3.5": ("turbo", {"guidance_scale": 1.0, "steps": 4}),
}


CLIPPING = ("threshold", "clip-sample")  # wrappers that clip the images of each step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """A model's default options."""

    guidance_scale: float = 7.5
    guidance: str = "cfg"
    steps: int = 50
    sampler: str | None  # None: jaxdiff has no counterpart of the scheduler config's
    timestep_spacing: str | None = None  # None: that of the scheduler config
    height: int
    width: int
    # whether the training captions contained only words that are single tokens; jaxdiff then warns
    # of all other words
    closed_vocabulary: bool = False
    # a wrapper of every rule, unless a request has one of CLIPPING: what clips images in each step
    clipping: str | None = None

    def __post_init__(self) -> None:
        own = {"closed_vocabulary", "clipping"}
        check_options({name: value for name, value in vars(self).items() if name not in own})
        parse(self.with_clipping(self.guidance))

    def with_clipping(self, guidance: str) -> str:
        """A guidance rule with the wrapper that clips, unless it has one itself."""
        wrappers = [part.partition(":")[0] for part in guidance.split("+")[1:]]
        if self.clipping is None or any(name in wrappers for name in CLIPPING):
            return guidance
        return f"{guidance}+{self.clipping}"


def model_defaults(parts: PipelineComponents, family: Family, source: str) -> Defaults:
    """The defaults of a model, whose weights need not be read; `source` is for errors."""
    modules: dict[str, Any] = {name: each.module for name, each in parts.components.items()}
    sample_size = modules[family.network].config.sample_size
    config = parts.components[family.network].config
    native = native_sample_size(config, sample_size, parts.class_name)
    return read_defaults(
        parts.defaults,
        parts.scheduler,
        size_of(native, family.codec(modules).config.downscale),
        pixels=family.latent_codec is None,
        pipeline_class=parts.class_name,
        family={**family.request_defaults, **_of_name(family.name, source)},
        source=source,
    )


def _of_name(family: str, source: str) -> Mapping[str, Any]:
    """The defaults of a distilled model of the family, if `source` is named as one."""
    word, defaults = DEFAULTS_OF_NAMES.get(family, ("", {}))
    return defaults if word in pathlib.PurePath(source).name.lower() else {}


def read_defaults(
    stored: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    native: tuple[int, int],
    *,
    pixels: bool = False,
    pipeline_class: str = "",
    family: Mapping[str, Any] = MappingProxyType({}),
    source: str,
) -> Defaults:
    """The defaults in jaxdiff.json, then of pipeline class, scheduler config, family and size."""
    of_class = DEFAULTS_OF_CLASSES.get(pipeline_class, {})
    size = {"height": native[0], "width": native[1]}
    values = {**size, **family, **_distilled(scheduler), **of_class, **stored}
    if "sampler" not in values:
        values["sampler"] = _default_sampler(scheduler)
    if "clipping" not in values:
        values["clipping"] = clipping_of(scheduler, pixels=pixels, pipeline_class=pipeline_class)
    return from_mapping(Defaults, values, source=source)


def size_of(sample_size: int | Sequence[int] | None, vae_scale_factor: int) -> tuple[int, int]:
    """Height and width in pixels for a UNet's `sample_size` (64 if it has none)."""
    latent = sample_size or 64
    height, width = (latent, latent) if isinstance(latent, int) else latent
    return height * vae_scale_factor, width * vae_scale_factor


def _distilled(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of step-distilled models, which their scheduler config reveals.

    LCM (2310.04378) has distilled guidance, SD-Turbo (2311.17042) uses none. Trailing timesteps
    start at pure noise. There a network that predicts eps says something about the image only if it
    was distilled to start from there.
    """
    name = str(scheduler.get("_class_name", ""))
    if name.startswith("LCM"):
        return {"guidance_scale": 1.0, "steps": 4}
    turbo = (
        name.startswith("Euler")
        and scheduler.get("timestep_spacing") == "trailing"
        and prediction_type_of(scheduler) == "epsilon"
    )
    return {"guidance_scale": 1.0, "steps": 1} if turbo else {}


def _default_sampler(scheduler: Mapping[str, Any]) -> str | None:
    """The sampler of a scheduler_config.json, if jaxdiff has it."""
    try:
        return sampler_name(scheduler)
    except InputError:
        return None
