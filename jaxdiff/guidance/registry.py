"""The guidance rules by name, and the notation in which users compose them."""

from collections.abc import Mapping

from jaxdiff.core.aliases import rename_guidance
from jaxdiff.core.errors import InputError
from jaxdiff.core.notation import split_options, with_options
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
    name, options = split_options("guidance", first)
    rule = _with_options(name, RULES[one_of("guidance", name, RULES)], options)
    for part in others:
        wrapper, options = split_options("guidance", part)
        wrapped = WRAPPERS[one_of("guidance", wrapper, WRAPPERS)](inner=rule)
        if rule.capabilities.separate_eps and not wrapped.keeps_separate_eps:
            fitting = [key for key, each in WRAPPERS.items() if each.keeps_separate_eps]
            raise InputError(
                f"guidance: got wrapper {wrapper} for {name}, expected {' or '.join(fitting)}"
            )
        rule = _with_options(wrapper, wrapped, options)
    return rule


def _with_options(name: str, rule: Guidance, options: Mapping[str, str]) -> Guidance:
    # what the request sets, not users
    internal = ("inner", "num_prompts", "null")
    return with_options("guidance", name, rule, options, internal=internal)
