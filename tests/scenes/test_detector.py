"""The judge names real drawings, clean and degraded, and nothing else; scores compare strictly."""

import numpy as np
import pytest
from scipy import ndimage

from jaxdiff.core.errors import InputError
from jaxdiff.scenes.detector import circle_deviation, detect, score
from jaxdiff.scenes.rendering import (
    BACKGROUND_RGB,
    NUM_LAYOUT_UNIFORMS,
    OBJECT_RGB,
    SHAPE_SDFS,
    ObjectLayout,
    layout_objects,
    render,
)
from jaxdiff.scenes.source import sample_scene, sample_variations
from jaxdiff.scenes.specification import Scene, SceneObject

RED_CIRCLE = SceneObject(size="small", colour="red", shape="circle")
BLUE_STAR = SceneObject(size="large", colour="blue", shape="star")
PAIR = Scene(objects=(RED_CIRCLE, BLUE_STAR), relation="above", background="grey")
Y, X = np.mgrid[:64, :64] - 31.5


def renders(n, split, seed=0, size=64):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        scene = sample_scene(rng, split)
        layout = layout_objects(scene, rng.random(NUM_LAYOUT_UNIFORMS))
        yield scene, layout, render(scene, layout, size)


def to_bytes(pixels):
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def noisy(image, sigma=9.0):
    """28 to 30 dB from the original, as an autoencoder gives."""
    rng = np.random.default_rng(int(image.sum()))
    return to_bytes(image + rng.normal(0, sigma, image.shape))


def blurred(image, sigma=0.7):
    return to_bytes(ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0)))


def ringing(image):
    """Overshoot at the edges, as quantised frequencies give."""
    pixels = image.astype(float)
    return to_bytes(pixels + 0.6 * (pixels - ndimage.gaussian_filter(pixels, (1.5, 1.5, 0))))


DEGRADED = {
    "clean": lambda image: image,
    "noise": noisy,
    "blur": blurred,
    "blur and noise": lambda image: noisy(blurred(image), 6.0),
    "ringing": ringing,
}


@pytest.mark.parametrize(("split", "size"), [("train", 64), ("heldout", 64), ("train", 128)])
@pytest.mark.parametrize("how", DEGRADED)
@pytest.mark.parametrize("count", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_real_drawings_are_named(how, split, size, count):
    for scene, layout, image in renders(count, split, size=size):
        observation = detect(DEGRADED[how](image))
        assert score(scene, observation).all_correct, (scene, observation)
        seen = sorted((obj.centre for obj in observation.objects), key=sum)
        np.testing.assert_allclose(seen, sorted(layout.centres, key=sum), atol=0.8)
        radii = sorted(obj.radius for obj in observation.objects)
        np.testing.assert_allclose(radii, sorted(layout.radii), rtol=0.08)


def test_every_minimal_change_is_noticed():
    rng = np.random.default_rng(1)
    for scene, _, image in renders(25, "train", seed=1):
        observation = detect(image)
        for other in sample_variations(scene, 7, rng):
            assert not score(other, observation).all_correct, other


def picture(distance, colour="red", background="white"):
    """A picture of the area where a signed distance is negative."""
    inside = np.clip(0.5 - distance, 0, 1)[..., None]
    ground = np.array(BACKGROUND_RGB[background], float)
    return to_bytes(ground + inside * (np.array(OBJECT_RGB[colour], float) - ground))


def blob(rng, radius):
    """A random closed curve with a few waves around a circle."""
    angle = np.arctan2(Y, X)
    waves = [
        rng.normal(0, 0.22 / np.sqrt(k)) * np.cos(k * angle + rng.uniform(0, 6.28))
        for k in range(1, 6)
    ]
    return np.hypot(X, Y) - radius * (1 + sum(waves))


def names(image):
    return [obj.shape for obj in detect(image).objects]


def test_random_blobs_have_no_name():
    rng = np.random.default_rng(0)
    named = [names(picture(blob(rng, rng.uniform(8, 13)))) for _ in range(100)]
    assert sum(any(found) for found in named) <= 6


@pytest.mark.parametrize("radius", [8.5, 13.0])
def test_other_figures_have_no_name(radius):
    figures = {
        "ellipse": np.hypot(X / 1.2, Y * 1.2) - radius,
        "diamond": (np.abs(X) + np.abs(Y)) / np.sqrt(2) - 0.9 * radius,
        "bar": np.maximum(np.abs(X) - 1.1 * radius, np.abs(Y) - 0.7 * radius),
        "half disc": np.maximum(np.hypot(X, Y) - 1.2 * radius, Y),
        "triangle upside down": SHAPE_SDFS["triangle"].distance(X, -Y, radius),
        "tilted cross": SHAPE_SDFS["cross"].distance((X - Y) / 2**0.5, (X + Y) / 2**0.5, radius),
    }
    for name, distance in figures.items():
        assert names(picture(distance)) == [None], name


def test_noise_and_emptiness_are_not_a_scene():
    assert detect(np.full((64, 64, 3), 255, np.uint8)).objects == ()
    static = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not score(PAIR, detect(static)).all_correct
    for colour in ((120, 60, 20), OBJECT_RGB["black"]):
        flat = detect(np.full((64, 64, 3), colour, np.uint8))
        assert (flat.background, flat.objects) == (None, ())


@pytest.mark.parametrize("size", [64, 128])
def test_the_deviation_of_an_ellipse_is_its_closed_form(size):
    middles = (np.arange(size) + 0.5) / size * 64 - 32
    x, y = np.meshgrid(middles, middles)
    a, b, scale = 15.0, 12.0, size / 64
    radius = np.hypot(x, y)
    angle = np.arctan2(y, x)
    edge = a * b / np.hypot(b * np.cos(angle), a * np.sin(angle))
    image = picture((radius - edge) * scale)
    theta = np.linspace(0, 2 * np.pi, 100_000, endpoint=False)
    exact = a * b / np.hypot(b * np.cos(theta), a * np.sin(theta))
    expected = np.mean(np.abs(exact - exact.mean())) / exact.mean()
    assert circle_deviation(image) == pytest.approx(expected, rel=0.03)


def test_a_drawn_circle_is_round_and_other_images_have_no_circle():
    circle = Scene(objects=(RED_CIRCLE,), background="pink")
    assert circle_deviation(render(circle)) < 0.006
    assert circle_deviation(render(circle, size=128)) < 0.003
    assert circle_deviation(render(PAIR)) is None
    assert circle_deviation(np.full((64, 64, 3), 255, np.uint8)) is None


def test_specks_are_ignored_and_larger_leftovers_count():
    image = render(PAIR)
    image[4:8, 4:9] = (120, 80, 40)  # 20 pixels of brown
    assert score(PAIR, detect(image)).all_correct
    image[4:10, 4:10] = (120, 80, 40)
    result = score(PAIR, detect(image))
    assert not result.count
    assert all((*result.colours, *result.shapes, *result.sizes, result.relation))


def test_a_missing_thing_is_wrong_in_all():
    alone = Scene(objects=(RED_CIRCLE,), background="grey")
    result = score(PAIR, detect(render(alone)))
    assert result.colours == result.shapes == result.sizes == (True, False)
    assert (result.background, result.count, result.relation) == (True, False, False)
    nothing = score(PAIR, detect(np.full((64, 64, 3), 165, np.uint8)))
    assert nothing.colours == nothing.shapes == (False, False)


def test_things_are_matched_whatever_their_order():
    swapped = Scene(objects=(BLUE_STAR, RED_CIRCLE), relation="above", background="grey")
    result = score(swapped, detect(render(PAIR)))
    assert result.colours == result.shapes == result.sizes == (True, True)
    assert result.relation is False
    assert not result.all_correct


def test_what_is_open_is_not_judged():
    said = Scene(objects=(SceneObject(colour="red", shape="circle"),))
    result = score(said, detect(render(Scene(objects=(RED_CIRCLE,), background="pink"))))
    assert (result.background, result.sizes, result.relation) == (None, (None,), None)
    assert result.all_correct


def test_a_diagonal_is_decided_by_the_longer_way():
    for dx, dy, right in ((4.0, 30.0, True), (24.0, 20.0, False)):
        layout = ObjectLayout(centres=((18.0, 14.0), (18.0 + dx, 14.0 + dy)), radii=(8.5, 12.8))
        assert score(PAIR, detect(render(PAIR, layout))).relation is right


def test_an_image_of_another_size_is_refused():
    with pytest.raises(InputError, match="image"):
        detect(np.zeros((32, 32, 3), np.uint8))
