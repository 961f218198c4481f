"""`Options`: what a call of the pipeline may say of its images, beside their prompts."""

from collections.abc import Sequence
from typing import TypedDict


class Options(TypedDict, total=False):
    """Options of a call; None takes the model's default.

    A sequence has one entry per image. `Request` documents the others. Options that only some
    families read are declared by their extras (`families.extras.Extra`).
    """

    prompt_2: str | Sequence[str | None] | None  # prompt of the second text encoder
    negative_prompt: str | Sequence[str | None] | None  # what the image should not show
    negative_prompt_2: str | Sequence[str | None] | None  # of the second text encoder
    prompt_3: str | Sequence[str | None] | None  # of the third
    negative_prompt_3: str | Sequence[str | None] | None
    guidance_scale: float | Sequence[float] | None
    guidance: str | None  # such as "cfg" or "apg:eta=0.2+interval:lo=0.3"
    negative_scale: (
        float | Sequence[float | None] | None
    )  # of the negative prompt, in rule "negative"
    classifier_scale: float | Sequence[float | None] | None  # of classifier guidance
    clip_scale: float | Sequence[float | None] | None  # of CLIP guidance
    seed: int | Sequence[int]  # an integer s: image i has seed s + i
    steps: int | Sequence[int | None] | None
    sampler: str | None  # such as "ddim:eta=0.5" or "heun:s_churn=40"
    timestep_spacing: str | Sequence[str | None] | None
    eta: float | None
    height: int | None  # in pixels
    width: int | None
    prompt_syntax: bool | None
    clip_skip: int | None
    max_sequence_length: int | None
    strength: float | Sequence[float | None] | None
    denoising_start: float | None
    denoising_end: float | None
