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
class Noting(Stage):
    """Notes what it was asked for, and adds one; image `number` becomes not finite, if any."""

    name: str
    number: int | None = None
    notes: list = dataclasses.field(default_factory=list)

    option = "noting"
    pipe = Pipeline.__new__(Pipeline)
    settings = {}  # noqa: RUF012

    def before(self, requests):
        return [dataclasses.replace(r, prompt=f"{r.prompt} {self.name}") for r in requests]

    def run(self, previous, arguments, **settings):
        self.notes.append((self.name, arguments["prompt"], settings["output"]))
        images = previous.images + 1
        if self.number is None:
            return output(images, {})
        images[self.number] = np.nan
        raise NonFiniteImageError(output(images, {self.number: self.name}))


def test_each_goes_on_from_the_one_before_and_the_first_failure_of_an_image_counts():
    """An image that is not finite is zeros to the stages behind, so that the others go on."""
    notes = []
    stages = [Noting(name, number, notes) for name, number in (("a", 1), ("b", 1), ("c", None))]
    first = output(np.array([[0.0], [0.0]]), {})
    out = run_stages(stages, first, {"prompt": "a star"}, output="pil")
    kinds = ("latent", "latent", "pil")
    assert notes == [(n, "a star", k) for n, k in zip("abc", kinds, strict=True)]
    np.testing.assert_array_equal(out.images, [[3.0], [1.0]])
    assert out.failures == {1: "a"}
    assert out.timings == {"sample_s": 4.0}


def test_the_first_model_gets_what_all_stages_ask_for_from_the_last():
    (first,) = first_requests([Noting("a"), Noting("b")], [REQUEST])
    assert first.prompt == "a star b a"


def test_a_stage_refuses_masks_by_the_name_of_its_option():
    assert Stage.before(Noting("a"), [REQUEST]) == [REQUEST]
    masked = dataclasses.replace(REQUEST, mask=np.ones((16, 16), bool))
    with pytest.raises(InputError, match=r"^noting: got it with a mask"):
        Stage.before(Noting("a"), [masked])
