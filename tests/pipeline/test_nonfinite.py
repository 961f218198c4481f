"""Numbers that are not finite are errors that name the image; other images are kept."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import jaxdiff
from jaxdiff.core.errors import InputError
from jaxdiff.models.build import param_dict, replace_weights
from jaxdiff.pipeline.nonfinite import NonFiniteImageError

WORDS = ["a red ring", "a star"]


@pytest.fixture(scope="module")
def broken(single):
    """A model whose embedding of "star" is NaN."""
    pipe = tiny.first_devices(single, 1)
    encoder = pipe.text_encoder
    (token,) = pipe._tokenizers.first.ids("star")
    path = encoder.token_embedding
    weights = param_dict(encoder)[path]
    replace_weights(encoder, {path: weights.at[token].set(jnp.nan)})
    pipe._weights_changed()
    return pipe


def test_the_image_and_its_first_step_are_named_and_others_kept(broken, single):
    with pytest.raises(NonFiniteImageError, match=r"^1 of 2 images: .* 'a star' \(seed 1\)") as err:
        broken(WORDS, steps=3)
    out = err.value.output
    assert out.failures == {1: "from step 0 of 3"}
    np.testing.assert_array_equal(out.images[0], single(WORDS[0], steps=3).images[0])


@pytest.mark.parametrize("tile", [None, 8])
def test_a_decoder_that_overflows_is_told_from_a_network(single, tile):
    pipe = tiny.first_devices(single, 1)
    bias = "decoder.conv_out.bias"
    replace_weights(pipe.vae, {bias: param_dict(pipe.vae)[bias] + jnp.inf})
    pipe = tiny.first_devices(pipe, 1)
    with pytest.raises(NonFiniteImageError, match="in the last step or the decoder"):
        pipe(WORDS[0], steps=2, vae_tile=tile)
    latents = pipe(WORDS[0], steps=2, output="latent").images  # these are finite
    with pytest.raises(InputError, match=r"^latents: got images \[0\] that are not finite"):
        pipe.decode_latents(latents, vae_tile=tile)


def test_a_stream_says_it_and_goes_on(broken):
    requests = broken.resolve([WORDS[1], WORDS[0]], steps=2)
    found = [(numbers, out.failures) for numbers, out in broken.stream(requests, batch_size=1)]
    assert found == [([0], {0: "from step 0 of 2"}), ([1], {})]
    with pytest.raises(NonFiniteImageError):
        broken(WORDS[1], steps=2, output="latent")


def test_inputs_that_are_not_finite(single):
    noise = np.full((1, 8, 8, 4), np.nan, np.float32)
    with pytest.raises(InputError, match=r"^latents: got numbers that are not finite"):
        single(WORDS[0], latents=noise)
    with pytest.raises(InputError, match=r"^image: got latents that are not finite"):
        single(WORDS[0], image=noise)


def test_images_in_float16_are_decoded_in_float32(tmp_path):
    """A VAE whose activations exceed 65504, as that of SDXL."""
    folder = tiny.write_tiny(tmp_path / "tiny")
    wide = jaxdiff.load(folder)
    for path in ("decoder.conv_in.kernel", "decoder.conv_in.bias"):
        replace_weights(wide.vae, {path: 2e4 * param_dict(wide.vae)[path]})
    wide.save(tmp_path / "wide")
    images = {
        dtype: np.asarray(
            jaxdiff.load(tmp_path / "wide", dtype=dtype)(WORDS[0], steps=2, output="numpy").images,
            np.float32,
        )
        for dtype in ("float32", "float16")
    }
    assert images["float32"].std() > 1
    assert np.abs(images["float32"] - images["float16"]).mean() < 3


def test_an_image_of_an_odd_size_is_resized_with_a_word(single):
    photo = Image.new("RGB", (17, 13), (9, 200, 30))
    with pytest.warns(UserWarning, match=r"^image: resized from height 13 to 12, width 17 to 16"):
        requests = single.resolve(WORDS[0], image=photo)
    assert (requests.height, requests.width) == (12, 16)
