"""Several prompts for one image, joined by AND (composable diffusion, 2206.01714).

`a cat AND a dog:0.5 AND NOT snow` asks for a cat, half as much for a dog, and for no snow: each
part has its own stream and a weight, 1 if it has no number and negative after NOT.
"""

import re
from typing import NamedTuple

from jaxdiff.core.errors import InputError

MAX_PARTS = 8
MAX_WEIGHT = 100.0
_WEIGHT = re.compile(r"\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")
_NOT = re.compile(r"^\s*NOT\b")


class SubPrompt(NamedTuple):
    """One of the prompts of an image."""

    text: str
    weight: float


def split_and(prompt: str, *, syntax: bool = True) -> list[SubPrompt]:
    """The prompts that AND joins in `prompt`; a single one is taken as it is.

    Raises InputError for too many, and for weights beyond MAX_WEIGHT.
    """
    texts = re.split(r"\bAND\b", prompt) if syntax else [prompt]
    if len(texts) == 1:
        return [SubPrompt(prompt, 1.0)]
    if len(texts) > MAX_PARTS:
        raise InputError(
            f"prompt: got {len(texts)} prompts joined by AND, expected at most {MAX_PARTS}"
        )
    return [_part(text) for text in texts]


def _part(text: str) -> SubPrompt:
    number = _WEIGHT.search(text)
    weight = 1.0 if number is None else float(number.group(1))
    if abs(weight) > MAX_WEIGHT:
        raise InputError(
            f"prompt: got weight {weight:g} for {text!r:.60}, expected at most {MAX_WEIGHT:g}"
        )
    words, negated = _NOT.subn("", _WEIGHT.sub("", text))
    return SubPrompt(words.strip(), -weight if negated else weight)
