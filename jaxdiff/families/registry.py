"""The families by diffusers' pipeline classes."""

from collections.abc import Callable
from types import ModuleType

from jaxdiff.families import (
    chroma,
    class_conditional_ldm,
    deepfloyd_if,
    dit,
    flux,
    glide,
    kandinsky,
    karlo,
    latent_diffusion,
    pixart,
    pixel_diffusion,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_upscale,
    stable_unclip,
)
from jaxdiff.families.base import Family

# (modules by component, plain values of model_index.json with its _class_name, source=...) ->
# family; InputError for modules that do not fit together.
Detect = Callable[..., Family]
# Files with `PIPELINE_CLASSES`, `FAMILIES`, and `detect`, which tells the families apart. If
# networks can be trained from scratch, `FROM_SCRATCH` is the pipeline class of such a model, and
# its family.
FAMILY_MODULES: tuple[ModuleType, ...] = (
    stable_diffusion,
    latent_diffusion,
    class_conditional_ldm,
    stable_diffusion_3,
    dit,
    pixart,
    flux,
    chroma,
    deepfloyd_if,
    pixel_diffusion,
    stable_diffusion_upscale,
    glide,
    kandinsky,
    stable_unclip,
    karlo,
)
DETECT: dict[str, Detect] = {
    name: module.detect for module in FAMILY_MODULES for name in module.PIPELINE_CLASSES
}
_FROM_SCRATCH = [getattr(module, "FROM_SCRATCH", None) for module in FAMILY_MODULES]
# By the class of the network that denoises, and whether it denoises pixels.
FROM_SCRATCH: dict[tuple[type, bool], tuple[str, Family]] = {
    (each[1].network_class, each[1].latent_codec is None): each
    for each in _FROM_SCRATCH
    if each is not None
}
# Every family, for the options of requests that any of them reads.
FAMILIES: list[Family] = [family for module in FAMILY_MODULES for family in module.FAMILIES]
