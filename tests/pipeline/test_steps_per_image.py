"""Images of one call with steps, spacings and strengths of their own, on a tiny model."""

import numpy as np
import pytest
from PIL import Image

from jaxdiff.core.errors import InputError

PROMPTS = ["a small red circle", "a blue star"]
LATENT = {"output": "latent", "seed": [3, 4]}


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    return Image.fromarray(pixels)


def alone(pipe, index, **options):
    """Image `index` of the two from a call in which both have its options."""
    own = {
        name: value[index] if isinstance(value, list) else value for name, value in options.items()
    }
    return pipe(PROMPTS, **own, **LATENT).images[index]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"steps": [3, 6], "sampler": "heun"}, 0),
        ({"steps": [5, 2], "timestep_spacing": ["karras", "trailing"], "sampler": "euler"}, 0),
        ({"steps": [6, 4], "denoising_end": 0.5}, 0),
        # The network rounds differently when it is called for both streams of the other image.
        ({"steps": [3, 6], "guidance": "apg:momentum=-0.5+interval:lo=0.3,hi=5"}, 1e-5),
    ],
    ids=["heun", "spacing", "part", "rule"],
)
def test_one_call_is_one_program_and_gives_what_two_give(single, options, tolerance):
    first = alone(single, 0, **options)
    compiled = single.stages.compilations
    both = single(PROMPTS, **options, **LATENT).images
    for mine, own in zip(both, (first, alone(single, 1, **options)), strict=True):
        np.testing.assert_allclose(mine, own, rtol=tolerance, atol=tolerance)
    assert single.stages.compilations == compiled


@pytest.mark.parametrize("masked", [False, True])
def test_strengths_of_images_with_and_without_a_mask(single, picture, masked):
    mask = np.zeros((16, 16), bool)
    mask[:, 8:] = True
    options = {"image": picture, "mask": mask if masked else None, "steps": [4, 8]}
    options["strength"] = [1.0, 0.5]  # with a mask the first begins from noise alone
    both = single(PROMPTS, **options, **LATENT).images
    for index in (0, 1):
        np.testing.assert_array_equal(both[index], alone(single, index, **options))


def test_intermediates_are_at_the_levels_of_each_image(single):
    out = single(PROMPTS, steps=[3, 6], intermediate_steps=[1, 2], sampler="euler", **LATENT)
    seen = out.intermediates
    assert seen.alpha.shape == seen.sigma.shape == (2, 2)
    for index, steps in enumerate((3, 6)):
        own = single(PROMPTS, steps=steps, intermediate_steps=[1, 2], sampler="euler", **LATENT)
        assert own.intermediates.alpha.shape == (2,)
        np.testing.assert_array_equal(seen.alpha[:, index], own.intermediates.alpha)
        np.testing.assert_array_equal(seen.x[:, index], own.intermediates.x[:, index])
        np.testing.assert_array_equal(seen.x0[:, index], own.intermediates.x0[:, index])
    assert seen.unit_variance.shape == seen.x.shape
    with pytest.raises(InputError, match="intermediate_steps: got 3"):
        single(PROMPTS, steps=[3, 6], intermediate_steps=[3], **LATENT)


def test_the_request_knows_the_steps_of_each_image(single):
    request = single.resolve(PROMPTS, steps=[3, None], sampler="heun")
    assert request.steps == (3, single.defaults.steps)
    assert [request[i].to_metadata()["steps"] for i in (0, 1)] == list(request.steps)
    assert [single.nfe(request, i) for i in (0, 1)] == [2 * (2 * n - 1) for n in request.steps]
    assert single.resolve("a ring", steps=[2, 3]).prompts == ("a ring", "a ring")
    with pytest.raises(InputError, match="prompt: got 2 entries, expected 1 or 3"):
        single.resolve(PROMPTS, steps=[1, 2, 3])
    with pytest.raises(InputError, match="steps: got 0"):
        single.resolve(PROMPTS, steps=[1, 0])
