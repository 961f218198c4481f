"""Prompts joined by AND."""

import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.pipeline.prompts import split_and


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("", [("", 1.0)]),
        ("a ratio of 16:9", [("a ratio of 16:9", 1.0)]),
        ("salt and pepper", [("salt and pepper", 1.0)]),
        ("SAND AND SEA", [("SAND", 1.0), ("SEA", 1.0)]),
        ("a cat AND a dog:0.5", [("a cat", 1.0), ("a dog", 0.5)]),
        ("a cat :1.2 AND a dog : -.5 ", [("a cat", 1.2), ("a dog", -0.5)]),
        ("a cat AND NOT snow", [("a cat", 1.0), ("snow", -1.0)]),
        ("a cat AND NOT snow:2", [("a cat", 1.0), ("snow", -2.0)]),
        ("a NOTE AND NOTHING", [("a NOTE", 1.0), ("NOTHING", 1.0)]),
        ("(a cat:1.3) AND [a dog]", [("(a cat:1.3)", 1.0), ("[a dog]", 1.0)]),
        ("a cat AND", [("a cat", 1.0), ("", 1.0)]),
    ],
)
def test_parts(prompt, parts):
    assert split_and(prompt) == parts


def test_without_syntax_a_prompt_is_one():
    assert split_and("a cat AND a dog:2", syntax=False) == [("a cat AND a dog:2", 1.0)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" AND ".join("abcdefghi"), "prompt: got 9 prompts joined by AND, expected at most 8"),
        ("a AND b:1000", "prompt: got weight 1000 for ' b:1000', expected at most 100"),
    ],
)
def test_too_much(prompt, message):
    with pytest.raises(InputError, match=message):
        split_and(prompt)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch_without_and_among_others_with_it(single, batch_size):
    prompts, seeds = ["a red star AND a ring:0.5", "a ring"], [3, 4]
    options = {"output": "latent", "steps": 2}
    together = single(prompts, seed=seeds, batch_size=batch_size, **options).images
    for row, prompt, seed in zip(together, prompts, seeds, strict=True):
        alone = single(prompt, seed=seed, **options).images[0]
        np.testing.assert_allclose(row, alone, rtol=0, atol=2e-5 * np.abs(alone).max())
