"""A list of stages: what each gets, and what is added up."""

import dataclasses

import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.pipeline.intermediates import Intermediates
from jaxdiff.pipeline.nonfinite import NonFiniteImageError
from jaxdiff.pipeline.output import Output
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.pipeline.request import Request, Requests
from jaxdiff.pipeline.stages import Stage, first_requests, run_stages

REQUEST = Request(
    prompt="a star",
    negative_prompt=None,
    guidance_scale=3.0,
    seed=0,
    guidance="cfg",
    sampler="ddim",
    steps=2,
    timestep_spacing="leading",
    height=16,
    width=16,
)


NONE = Intermediates(
    steps=(),
    alpha=np.zeros(0, np.float32),
    sigma=np.zeros(0, np.float32),
    x=np.zeros((0, 2, 8, 8, 4), np.float32),
    x0=np.zeros((0, 2, 8, 8, 4), np.float32),
)


def output(images, failures):
    return Output(
        images=images,
        requests=Requests([REQUEST, REQUEST]),
        timings={"sample_s": 1.0},
        intermediates=NONE,
        failures=failures,
    )


@dataclasses.dataclass
class Appending(Stage):
    """Notes what it was asked for; image `number` of what it gives is not finite, if any."""

    name: str
    number: int | None = None

    option = "appending"
    pipe = Pipeline.__new__(Pipeline)
    settings = {}  # noqa: RUF012

    def before(self, requests):
        return [dataclasses.replace(r, prompt=f"{r.prompt} {self.name}") for r in requests]

    def run(self, previous, arguments, **settings):
        asked = self.name, arguments["prompt"], settings["output"]
        failures = {} if self.number is None else {self.number: self.name}
        found = output([*previous.images, asked], failures)
        if failures:
            raise NonFiniteImageError(found)
        return found


def test_each_goes_on_from_the_one_before_and_the_first_failure_of_an_image_counts():
    stages = [Appending("a", 1), Appending("b", 1), Appending("c", 0)]
    first = output([], {})
    out = run_stages(stages, first, {"prompt": "a star"}, output="pil")
    kinds = ("latent", "latent", "pil")
    assert out.images == [(n, "a star", k) for n, k in zip("abc", kinds, strict=True)]
    assert out.failures == {1: "a", 0: "c"}
    assert out.timings == {"sample_s": 4.0}


def test_the_first_model_gets_what_all_stages_ask_for_from_the_last():
    (first,) = first_requests([Appending("a"), Appending("b")], [REQUEST])
    assert first.prompt == "a star b a"


def test_a_stage_refuses_masks_by_the_name_of_its_option():
    assert Stage.before(Appending("a"), [REQUEST]) == [REQUEST]
    masked = dataclasses.replace(REQUEST, mask=np.ones((16, 16), bool))
    with pytest.raises(InputError, match=r"^appending: got it with a mask"):
        Stage.before(Appending("a"), [masked])
