"""The families by diffusers' pipeline classes, and the options of requests that they read."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.families import (
    chroma,
    class_conditional_ldm,
    dit,
    flux,
    latent_diffusion,
    pixart,
    stable_diffusion,
    stable_diffusion_3,
)
from jaxdiff.families.base import Family
from jaxdiff.families.extras import Option

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
)
DETECT: dict[str, Detect] = {
    name: module.detect for module in FAMILY_MODULES for name in module.PIPELINE_CLASSES
}
# By the class of the network that denoises.
FROM_SCRATCH: dict[type, tuple[str, Family]] = {
    module.FROM_SCRATCH[1].network_class: module.FROM_SCRATCH
    for module in FAMILY_MODULES
    if hasattr(module, "FROM_SCRATCH")
}
# Every family, for the options of requests that any of them reads.
FAMILIES: list[Family] = [family for module in FAMILY_MODULES for family in module.FAMILIES]


def request_options() -> dict[str, Option]:
    """The options of requests that any family reads."""
    return {name: option for family in FAMILIES for name, option in family.options.items()}


def accepted_options(family: Family, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that `family` reads, without defaults.

    InputError for values out of range, and for options that only other families read.
    """
    accepted, known = {}, request_options()
    for name, given in options.items():
        value = tuple(given) if isinstance(given, list) else given
        known[one_of("option", name, known)].check(name, value)
        if value is None or value == known[name].default:
            continue
        if name in family.options:
            accepted[name] = value
        else:
            raise InputError(f"{name}: got {value}, expected none for {family.name}")
    return accepted
