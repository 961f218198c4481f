"""Guidance: how K predictions under different conditions become one, at every step of a sampler.

A rule says which streams it needs and how they combine; `guided_denoiser` runs them in one network
call and wraps rule and network into the denoiser that a sampler calls. Wrappers change a rule in
one respect; classifier guidance adds the gradient of a function of the image.
"""

from jaxdiff.guidance.apg import APG
from jaxdiff.guidance.base import (
    RULES,
    WRAPPERS,
    DenoiserInput,
    Guidance,
    GuidanceScales,
    Stream,
    parse,
)
from jaxdiff.guidance.cfg_plus_plus import CFGPlusPlus
from jaxdiff.guidance.cfg_zero_star import CFGZeroStar
from jaxdiff.guidance.classifier_free import ClassifierFree
from jaxdiff.guidance.denoiser import guided_denoiser, stack_streams
from jaxdiff.guidance.negative_prompt import NegativePromptGuidance
from jaxdiff.guidance.no_guidance import NoGuidance
from jaxdiff.guidance.rescale_threshold import (
    DynamicThresholding,
    GuidanceRescale,
    StaticThresholding,
)
from jaxdiff.guidance.rule import rule
from jaxdiff.guidance.scale_schedules import AdaptiveGuidance, GuidanceInterval, ScaleSchedule
from jaxdiff.guidance.weaker import Autoguidance, PerturbedAttention
from jaxdiff.guidance.wrapper import Wrapper

__all__ = [
    "RULES",
    "WRAPPERS",
    "DenoiserInput",
    "Guidance",
    "GuidanceScales",
    "Stream",
    "Wrapper",
    "guided_denoiser",
    "parse",
    "rule",
    "stack_streams",
]

RULES |= {
    "none": NoGuidance(),
    "cfg": ClassifierFree(),
    "negative": NegativePromptGuidance(),
    "apg": APG(),
    "cfg-pp": CFGPlusPlus(),
    "cfg-zero-star": CFGZeroStar(),
    "pag": PerturbedAttention(),
    "autoguidance": Autoguidance(),
}
WRAPPERS |= {
    "rescale": GuidanceRescale,
    "clip-sample": StaticThresholding,
    "threshold": DynamicThresholding,
    "interval": GuidanceInterval,
    "adaptive": AdaptiveGuidance,
    "schedule": ScaleSchedule,
}


def __dir__() -> list[str]:
    return __all__
