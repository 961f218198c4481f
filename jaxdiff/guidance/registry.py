"""The guidance rules by name, and the notation in which users compose them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdiff.core.aliases import rename_guidance
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.guidance.apg import APG
from jaxdiff.guidance.base import Guidance, Wrapper
from jaxdiff.guidance.cfg_plus_plus import CFGPlusPlus
from jaxdiff.guidance.cfg_zero_star import CFGZeroStar
from jaxdiff.guidance.classifier_free import ClassifierFree, NegativePromptGuidance, NoGuidance
from jaxdiff.guidance.rescale_threshold import (
    DynamicThresholding,
    GuidanceRescale,
    StaticThresholding,
)
from jaxdiff.guidance.schedules import AdaptiveGuidance, GuidanceInterval, ScaleSchedule
from jaxdiff.guidance.weaker import Autoguidance, PerturbedAttention

RULES: dict[str, Guidance] = {
    "none": NoGuidance(),
    "cfg": ClassifierFree(),
    "negative": NegativePromptGuidance(),
    "apg": APG(),
    "cfg-pp": CFGPlusPlus(),
    "cfg-zero-star": CFGZeroStar(),
    "pag": PerturbedAttention(),
    "autoguidance": Autoguidance(),
}
WRAPPERS: dict[str, type[Wrapper]] = {
    "rescale": GuidanceRescale,
    "clip-sample": StaticThresholding,
    "threshold": DynamicThresholding,
    "interval": GuidanceInterval,
    "adaptive": AdaptiveGuidance,
    "schedule": ScaleSchedule,
}


def parse(text: str) -> Guidance:
    """The rule that a text such as "apg:eta=0.2,norm_threshold=15+interval" describes.

    First a rule, then its wrappers from the inside out, each with options. Raises InputError.
    """
    first, *others = rename_guidance(text).split("+")
    name, options = _part(first)
    rule = RULES[one_of("guidance", name, RULES)]
    rule = dataclasses.replace(rule, **_values(name, rule, options))
    for part in others:
        wrapper, options = _part(part)
        wrapped = WRAPPERS[one_of("guidance", wrapper, WRAPPERS)](inner=rule)
        if rule.capabilities.separate_eps and not wrapped.keeps_separate_eps:
            fitting = [key for key, each in WRAPPERS.items() if each.keeps_separate_eps]
            raise InputError(
                f"guidance: got wrapper {wrapper} for {name}, expected {' or '.join(fitting)}"
            )
        rule = dataclasses.replace(wrapped, **_values(wrapper, wrapped, options))
    return rule


def _part(text: str) -> tuple[str, dict[str, str]]:
    """The parts of NAME or NAME:OPTION=VALUE,..."""
    name, _, rest = text.strip().partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    for key, equals, value in pairs:
        if not (equals and value):
            raise InputError(f"guidance: {name}: got {key!r}, expected {key or 'OPTION'}=VALUE")
    return name, {key.strip(): value.strip() for key, _, value in pairs}


def _values(name: str, rule: Guidance, options: Mapping[str, str]) -> dict[str, Any]:
    """Options converted to the types of the rule's fields."""
    fields = [f for f in dataclasses.fields(rule) if f.name not in _INTERNAL]
    known = {f.name: type(getattr(rule, f.name)) for f in fields}
    values: dict[str, Any] = {}
    for key, text in options.items():
        kind = known[one_of(f"guidance: {name}", key, known)]
        try:
            values[key] = _FLAGS[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            expected = "true or false" if kind is bool else f"a {kind.__name__}"
            raise InputError(f"guidance: {key}: got {text!r}, expected {expected}") from None
    return values


_FLAGS = {"true": True, "false": False}
_INTERNAL = ("inner", "num_prompts", "null")  # set from the request, not by users
