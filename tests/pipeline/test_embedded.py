"""The embedded model: what is shipped, and that it draws what it is told."""

import json

import numpy as np
import pytest

import jaxdiff
from jaxdiff.checkpoints.embedded import EMBEDDED
from jaxdiff.checkpoints.pipelines import read_pipeline
from jaxdiff.models.build import param_dict
from jaxdiff.scenes.detector import detect, score
from jaxdiff.scenes.source import sample_prompts


@pytest.fixture(scope="module")
def pipe():
    return jaxdiff.load()


def test_it_is_small_and_half_precision():
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    for component in read_pipeline(EMBEDDED).components.values():
        assert {str(array.dtype) for array in param_dict(component.module).values()} == {"float16"}


def test_its_defaults_are_recorded(pipe):
    recorded = json.loads((EMBEDDED / "jaxdiff.json").read_text())
    assert {name: getattr(pipe.defaults, name) for name in recorded} == recorded
    assert {"guidance_scale", "steps", "sampler"} <= recorded.keys()


@pytest.mark.slow
def test_it_draws_what_it_is_told_because_it_is_told(pipe):
    prompts = sample_prompts(32, 1, "one")
    texts = [prompt.text for prompt in prompts]

    def right(**options) -> tuple[float, float]:
        """The shares of right colours and of pictures that are right in everything."""
        images = pipe(texts, output="numpy", **options).images
        pairs = zip(prompts, images, strict=True)
        scores = [score(prompt.scene, detect(picture)) for prompt, picture in pairs]
        return np.mean([s.colours[0] for s in scores]), np.mean([s.all_correct for s in scores])

    colours, everything = right()
    assert colours >= 0.9
    assert everything >= 0.8
    colours, everything = right(guidance_scale=0.0)
    assert colours <= 0.4
    assert everything <= 0.1
