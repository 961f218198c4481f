"""Who comes from diffusers is understood, or told the name that a thing has here."""

import inspect
import pydoc

import numpy as np
import pytest

import jaxdiff
from jaxdiff.core.errors import InputError
from jaxdiff.pipeline.diffusers_arguments import REPLACED
from jaxdiff.pipeline.options import Options


def test_other_names_do_the_same(single):
    ours = single("a star", steps=2, seed=3, output="numpy").images
    theirs = single(
        "a star", num_inference_steps=2, seed=3, output_type="np", generator=None, return_dict=None
    ).images
    np.testing.assert_array_equal(ours, theirs)
    assert single.resolve("a star", num_inference_steps=7).steps == 7


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_not_here_is_answered(single, name):
    with pytest.raises(InputError, match=f"^{name}: got 5, expected "):
        single("a star", **{name: 5})


def test_timesteps_are_listed_as_in_diffusers(single):
    (request,) = single.resolve("a star", timesteps=[800])
    assert (request.steps, request.timestep_spacing) == (1, "800")
    (request,) = single.resolve("a star", timesteps=np.array([999, 499]))
    assert (request.steps, request.timestep_spacing) == (2, "999,499")
    for times, steps, message in (
        ([800], 2, "steps: got 2 with 1 timesteps, expected as many"),
        (
            [499, 999],
            2,
            "timestep_spacing: got 499,999, expected timesteps that fall",
        ),
        ([1000], 1, "timestep_spacing: got 1000, expected .* from at most 999 on"),
        ([0.5], 1, "timestep_spacing: got '0.5', expected one of leading"),
        ([[1], [2]], 1, "timestep_spacing: got"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            single("a star", timesteps=times, steps=steps)
    with pytest.raises(InputError, match=r"^sigmas: got \[14\], expected timestep_spacing"):
        single("a star", sigmas=[14])
    assert single.resolve("a star", timesteps=["karras"])[0].timestep_spacing == "karras"


def test_both_names_at_once_are_an_error(single):
    with pytest.raises(InputError, match=r"^steps: got num_inference_steps too"):
        single("a star", num_inference_steps=2, steps=3)


def test_unknown_arguments_are_errors_with_the_nearest_name(single):
    nearest = r"^guidance_scal: got an unknown .*mean 'guidance_scale'\?"
    with pytest.raises(InputError, match=nearest):
        single("a star", guidance_scal=3)
    with pytest.raises(InputError, match=r"^qq: got an unknown argument, expected one of help"):
        single.resolve("a star", qq=3)


def test_help_lists_every_option():
    listed = inspect.signature(jaxdiff.Pipeline.__call__).parameters
    assert listed.keys() >= {"prompt", "image", "output", *Options.__annotations__}
    assert "options" not in listed
    shown = ("steps", "seed", "prompt_syntax", "clip_skip", "aesthetic_score")
    assert [listed[name].default for name in shown] == [None, 0, True, 0, 6.0]
    assert "negative_prompt" in pydoc.render_doc(jaxdiff.Pipeline.__call__)


def test_from_pretrained_names_load():
    with pytest.raises(InputError, match=r"expected jaxdiff\.load"):
        jaxdiff.Pipeline.from_pretrained("folder", torch_dtype="float16")
