"""Tiles: they cover everything, blend to one, and change nothing that is local."""

from fractions import Fraction

import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.pipeline.tiling import starts, tiled


@pytest.mark.parametrize(("length", "tile", "step"), [(5, 8, 6), (8, 8, 6), (9, 8, 6), (50, 8, 6)])
def test_tiles_cover_the_length(length, tile, step):
    covered = np.zeros(length, int)
    for start in starts(length, tile, step):
        assert start >= 0
        assert start + min(tile, length) <= length
        covered[start : start + tile] += 1
    assert covered.min() >= 1


@pytest.mark.parametrize("shape", [(2, 16, 16, 3), (1, 40, 24, 2), (1, 34, 70, 1), (1, 8, 90, 1)])
def test_a_local_function_is_what_it_is_as_a_whole(shape):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    sizes = set()

    def double(part):
        sizes.add(part.shape)
        return np.repeat(np.repeat(np.tanh(part), 2, axis=1), 2, axis=2)

    got = tiled(double, array, tile=16, multiple=1, zoom=Fraction(2))
    assert len(sizes) == 1
    sizes.clear()
    np.testing.assert_allclose(got, double(array), atol=1e-6)


def test_the_way_down():
    array = np.random.default_rng(0).normal(size=(1, 48, 32, 3)).astype(np.float32)

    def half(part):
        return part.reshape(len(part), part.shape[1] // 4, 4, -1, 4, 3).mean(axis=(2, 4))

    got = tiled(half, array, tile=16, multiple=4, zoom=Fraction(1, 4))
    np.testing.assert_allclose(got, half(array), atol=1e-6)


def test_an_image_in_tiles_is_nearly_the_image(single):
    """Norms and attention see a tile instead of the picture: near, and with seams blended."""
    options = {"seed": 3, "steps": 2, "height": 48, "width": 32, "output": "numpy"}
    whole = single("a star", **options).images.astype(int)
    tiled = single("a star", vae_tile=24, **options).images.astype(int)
    assert 0 < np.abs(whole - tiled).mean() < 20
    large = single("a star", vae_tile=48, **options).images
    np.testing.assert_array_equal(large, whole)


def test_images_are_read_in_tiles_too(single):
    picture = np.random.default_rng(0).integers(0, 256, (48, 32, 3), np.uint8)
    options = {"image": picture, "seed": 3, "strength": 0.5, "output": "latent"}
    whole, tiled = (single("a star", vae_tile=t, **options).images for t in (None, 24))
    assert whole.shape == tiled.shape
    assert np.abs(whole - tiled).max() > 0


def test_a_bad_tile(single):
    with pytest.raises(
        InputError, match=r"^vae_tile: got 3, expected a multiple of 2 that is at least 4"
    ):
        single("a star", vae_tile=3)
