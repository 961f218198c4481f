"""The options of requests that families read."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.families import registry
from jaxdiff.families.base import Family
from jaxdiff.families.extras import Option


def request_options() -> dict[str, Option]:
    """The options of requests that any family reads."""
    return {name: option for family in registry.FAMILIES for name, option in family.options.items()}


def varies_image(family: Family) -> bool:
    """Whether the `image` of a call is one of which the network gets CLIP's embedding."""
    return any(extra.reads_image_prompt for extra in family.extras)


def accepted_options(family: Family, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that `family` reads, without defaults.

    InputError for values out of range, and for options that only other families read.
    """
    accepted, known = {}, request_options()
    for name, given in options.items():
        value = known[one_of("option", name, known)].check(name, given)
        default = known[name].default
        if value is None or (default is not None and value == default):
            continue
        if name in family.options:
            accepted[name] = value
        else:
            readers = ", ".join(each.name for each in registry.FAMILIES if name in each.options)
            got = f"{name}: got {value!s:.60}"
            raise InputError(f"{got}, expected none for {family.name}: it is read by {readers}")
    return accepted
