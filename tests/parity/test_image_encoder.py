"""Image encoders of pipeline folders and their preprocessing against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, randomise
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from jaxdiff.checkpoints.clip_vision import read_image_processor, read_vision
from jaxdiff.data.preprocessing import to_rgb
from jaxdiff.models.clip import CLIPVisionModel

SIDE = 28
SIZES = {"crop_size": {"height": SIDE, "width": SIDE}, "size": {"shortest_edge": SIDE}}
SHAPES = {
    "smaller": (20, 13, 3),
    "wide": (41, 97, 3),
    "odd": (101, 64, 3),
    "as-it-is": (SIDE, SIDE, 3),
    "alpha": (50, 31, 4),
    "grey": (33, 60),
}


def random_image(name):
    pixels = np.random.default_rng(len(name)).integers(0, 256, SHAPES[name], np.uint8)
    return Image.fromarray(pixels)


def processors(folder, **sizes):
    theirs = CLIPImageProcessorPil(**SIZES | sizes)
    theirs.save_pretrained(folder)
    return theirs, read_image_processor(folder, SIDE)


def pixels_of(theirs, images):
    return theirs(images, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)


@pytest.mark.parametrize("edge", [SIDE, SIDE + 5])
@pytest.mark.parametrize("name", SHAPES)
def test_pixels(tmp_path, name, edge):
    theirs, ours = processors(tmp_path, size={"shortest_edge": edge})
    expected = pixels_of(theirs, random_image(name))
    found = ours.preprocess([to_rgb(random_image(name))])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_pixels_that_are_squeezed(tmp_path):
    both = {"height": SIDE, "width": SIDE}
    theirs, ours = processors(tmp_path, size=both, do_center_crop=False)
    images = [random_image("wide"), random_image("odd")]
    expected = pixels_of(theirs, images)
    np.testing.assert_allclose(ours.preprocess(images), expected, rtol=0, atol=1e-6)
    arrays = [np.asarray(image) for image in images]
    np.testing.assert_array_equal(ours.preprocess(arrays), ours.preprocess(images))


@pytest.mark.parametrize("side", [SIDE, 45, 96])
def test_arrays_on_a_device(tmp_path, side):
    """Of squares they are the same up to the rounding to 256 levels, which are near one another.

    Beyond white and black, where a cubic filter may lead, levels are cut and arrays are not.
    """
    theirs, ours = processors(tmp_path)
    pixels = np.random.default_rng(0).integers(64, 192, (side, side, 3), np.uint8)
    expected = pixels_of(theirs, Image.fromarray(pixels))
    found = jax.jit(lambda x: ours(x))(jnp.asarray(pixels[None], jnp.float32) / 127.5 - 1)
    level = 1 / 255 / min(ours.std)
    assert np.abs(np.asarray(found) - expected).max() <= 1.01 * level


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_image_embeds_of_folders(tmp_path, act):
    """Heads of 13 channels, as bigG's of 104 are no power of two, and patches of 14 pixels."""
    config = CLIPVisionConfig(
        hidden_size=26,
        intermediate_size=40,
        projection_dim=18,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
        hidden_act=act,
    )
    theirs = randomise(CLIPVisionModelWithProjection(config))
    theirs.save_pretrained(tmp_path)
    processor, _ = processors(tmp_path)
    ours, ready = read_vision(tmp_path)
    assert isinstance(ours, CLIPVisionModel)
    images = [random_image("wide"), random_image("odd")]
    with torch.no_grad():
        expected = theirs(**processor(images, return_tensors="pt")).image_embeds
    pixels = jnp.asarray(ready.preprocess(images))
    agree(jax.jit(lambda x: ours(x).pooled)(pixels), expected)
    zeros = jnp.zeros((1, SIDE, SIDE, 3))  # the pixels of no image in priors
    agree(ours(zeros).pooled, theirs(torch.zeros(1, 3, SIDE, SIDE)).image_embeds)
