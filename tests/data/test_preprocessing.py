"""Preparation: upright, just covered, cropped, flipped, and what SDXL is told about it."""

import contextlib
import io
import math

import numpy as np
import pytest
from captioned_images import encoded
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxdiff.data.bad_samples import BadSampleError
from jaxdiff.data.preprocessing import (
    LONGEST,
    AugmentParams,
    resize_and_crop,
    sample_augmentation,
    size_of,
    size_to_cover,
)


def stored(array, form="PNG", **options):
    """An image file of these pixels."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def random_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF"])
def test_an_image_of_the_target_size_is_left_as_it_is(form):
    array = random_pixels(8, 6, 3)
    options = {"lossless": True} if form == "WEBP" else {}
    found = resize_and_crop(stored(array, form, **options), (8, 6))
    np.testing.assert_array_equal(found.image, array)
    assert found.time_ids.tolist() == [8, 6, 0, 0, 8, 6]
    assert found.time_ids.dtype == np.int32


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_of_an_animation_the_first_frame_is_used_and_that_is_said(form):
    frames = [Image.new("RGB", (6, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    said = contextlib.nullcontext()  # the pages of a TIFF are no frames
    if form != "TIFF":
        said = pytest.warns(UserWarning, match=f"animated {form} images, of which the first frame")
    with said:
        found = resize_and_crop(buffer.getvalue(), (8, 6))
    assert np.abs(found.image.astype(int) - (255, 0, 0)).max() < 4


@settings(deadline=None)
@given(
    original=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    size=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    top=st.floats(0, 1, exclude_max=True),
    left=st.floats(0, 1, exclude_max=True),
)
def test_crops_lie_inside_and_one_side_just_fits(original, size, top, left):
    cover = size_to_cover(original, size)
    assert all(c >= s for c, s in zip(cover, size, strict=True))
    assume(math.prod(cover) <= LONGEST * math.prod(size))  # others are refused
    assert any(c == s for c, s in zip(cover, size, strict=True))
    found = resize_and_crop(encoded(1, original), size, AugmentParams(top, left))
    assert found.image.shape == (*size, 3)
    ids = found.time_ids.tolist()
    assert ids[:2] == [*original]
    assert ids[4:] == [*size]
    assert all(0 <= at <= c - s for at, c, s in zip(ids[2:4], cover, size, strict=True))


@pytest.mark.parametrize(("top", "left"), [(0.0, 0.0), (0.5, 0.5), (0.99, 0.99), (0.3, 0.6)])
def test_the_recorded_crop_is_where_the_pixels_come_from(top, left):
    wide, tall = random_pixels(8, 20, 3), random_pixels(20, 8, 3)
    for array in (wide, tall):
        found = resize_and_crop(stored(array), (8, 8), AugmentParams(top, left))
        _, _, y, x, _, _ = found.time_ids.tolist()
        np.testing.assert_array_equal(found.image, array[y : y + 8, x : x + 8])
    mirrored = resize_and_crop(stored(wide), (8, 8), AugmentParams(top, left, 0.2))
    x = mirrored.time_ids[3]
    np.testing.assert_array_equal(mirrored.image, wide[:, ::-1][:, x : x + 8])


def test_the_default_crop_is_the_middle():
    array = random_pixels(8, 20, 3)
    np.testing.assert_array_equal(resize_and_crop(stored(array), (8, 8)).image, array[:, 6:14])


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_as_the_camera_was_held(tag, form):
    exif = Image.Exif()
    exif[0x0112] = tag
    array = np.zeros((16, 32, 3), np.uint8)
    array[:8, :8] = 255  # the corner that is first in the file
    options = {"quality": 100} if form == "JPEG" else {"lossless": True}
    data = stored(array, form, exif=exif, **options)
    shown = (16, 32) if tag <= 4 else (32, 16)
    assert size_of(data) == shown
    found = resize_and_crop(data, shown)
    assert found.time_ids.tolist()[:2] == [*shown]
    # EXIF 2.3, tag 274: which edges of what is shown the first row and column of the file are
    row, column = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[tag]
    top = slice(0, 8) if row == "t" else slice(-8, None)
    side = slice(0, 8) if column == "l" else slice(-8, None)
    assert found.image[top, side].min() > 240
    assert (found.image > 128).sum() == 8 * 8 * 3


def test_transparency_becomes_white_and_grey_becomes_colour():
    array = random_pixels(6, 6, 4)
    array[..., 3] = 0
    array[0, 0] = (1, 2, 3, 255)
    found = resize_and_crop(stored(array), (6, 6)).image
    assert found[0, 0].tolist() == [1, 2, 3]
    assert (found.reshape(-1, 3)[1:] == 255).all()
    grey = random_pixels(6, 6)
    np.testing.assert_array_equal(
        resize_and_crop(stored(grey), (6, 6)).image, np.stack([grey] * 3, -1)
    )
    deep = grey.astype(np.uint16) * 256 + 17
    np.testing.assert_array_equal(
        resize_and_crop(stored(deep), (6, 6)).image, np.stack([grey] * 3, -1)
    )
    palette = Image.fromarray(array[..., :3]).quantize(4)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    wanted = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(resize_and_crop(buffer.getvalue(), (6, 6)).image, wanted)


def test_a_large_jpeg_is_nearly_what_decoding_all_of_it_gives():
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    array = np.stack([np.broadcast_to(ramp, (480, 640))] * 3, -1)
    array[..., 1] = np.linspace(255, 0, 480).astype(np.uint8)[:, None]
    small = resize_and_crop(stored(array, "JPEG", quality=95), (48, 64)).image.astype(int)
    exact = resize_and_crop(stored(array), (48, 64)).image.astype(int)
    assert np.abs(small - exact).max() <= 4
    assert resize_and_crop(stored(array, "JPEG"), (48, 64)).time_ids.tolist() == [
        480,
        640,
        0,
        0,
        48,
        64,
    ]


def test_what_is_no_image_is_broken():
    data = encoded(1, (64, 64), "JPEG")
    for broken in (b"", b"GIF89a", b"no picture", data[: len(data) // 2], encoded(1)[:60]):
        with pytest.raises(BadSampleError, match="broken image"):
            resize_and_crop(broken, (8, 8))
    with pytest.raises(BadSampleError, match="broken image"):
        size_of(b"no picture")
    with pytest.raises(BadSampleError, match="far too long and thin"):
        resize_and_crop(encoded(1, (1, 400)), (8, 8))


@settings(deadline=None)
@given(cut=st.integers(0, 10**6), flips=st.lists(st.integers(0, 10**6), max_size=4))
def test_damaged_files_are_broken_or_images_and_nothing_else(cut, flips):
    data = bytearray(encoded(3, (20, 30), "JPEG", quality=90))
    del data[1 + cut % len(data) :]
    for flip in flips:
        data[flip % len(data)] ^= 1 + flip % 255
    with contextlib.suppress(BadSampleError):
        assert resize_and_crop(bytes(data), (8, 8)).image.shape == (8, 8, 3)


@settings(deadline=None)
@given(entropy=st.tuples(*[st.integers(0, 2**31 - 1)] * 3))
def test_draws_are_functions_of_their_entropy(entropy):
    one = sample_augmentation(entropy, crop="random", flip=True)
    assert one == sample_augmentation(entropy, crop="random", flip=True)
    assert all(0 <= u < 1 for u in one)
    assert sample_augmentation(entropy) == AugmentParams(0.5, 0.5, 1.0)
    assert sample_augmentation(entropy, crop="random") == one._replace(flip=1.0)
    assert sample_augmentation(entropy, flip=True) == AugmentParams(flip=one.flip)


def test_draws_are_uniform_and_flips_are_fair():
    found = np.array(
        [sample_augmentation((0, 0, i), crop="random", flip=True) for i in range(2000)]
    )
    np.testing.assert_allclose(found.mean(0), 0.5, atol=4 * np.sqrt(1 / 12 / 2000))
    np.testing.assert_allclose(np.corrcoef(found.T), np.eye(3), atol=0.1)
