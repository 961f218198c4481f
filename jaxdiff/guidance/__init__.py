"""Guidance: how K predictions under different conditions become one, at every step of a sampler.

A rule says which streams it needs and how they combine; `guided_denoiser` runs them in one network
call and wraps rule and network into the denoiser that a sampler calls. Wrappers change a rule in
one respect; classifier guidance adds the gradient of a function of the picture.
"""

from jaxdiff.guidance.base import DenoiserInput, Guidance, GuidanceScales, Stream, Wrapper, rule
from jaxdiff.guidance.denoiser import guided_denoiser, stack_streams
from jaxdiff.guidance.registry import RULES, WRAPPERS, parse

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
