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
# networks can be trained from scratch, `FROM_SCRATCH` has the families by the pipeline classes of
# such models.
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
# Pipeline class and family by the class of the network that denoises, whether it does without a
# latent codec, and whether it needs an image encoder.
FROM_SCRATCH: dict[tuple[type, bool, bool], tuple[str, Family]] = {
    (family.network_class, family.latent_codec is None, family.image_encoder is not None): (
        class_name,
        family,
    )
    for module in FAMILY_MODULES
    for class_name, family in getattr(module, "FROM_SCRATCH", {}).items()
}
# Every family, for the options of requests that any of them reads.
FAMILIES: list[Family] = [family for module in FAMILY_MODULES for family in module.FAMILIES]
