"""The scene data set: deterministic, well separated splits, clear pictures, truthful captions."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.scenes.captions import describe, parse_caption
from jaxdiff.scenes.rendering import (
    BACKGROUND_RGB,
    CANVAS,
    MARGIN,
    NUM_LAYOUT_UNIFORMS,
    OBJECT_RGB,
    RADII,
    SHAPE_SDFS,
    ObjectLayout,
    coverage,
    layout_objects,
    render,
)
from jaxdiff.scenes.source import (
    KINDS,
    SceneSource,
    sample_prompts,
    sample_scene,
    sample_variations,
)
from jaxdiff.scenes.specification import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    SceneObject,
    arrangement,
    is_held_out_pair,
    split_of,
)

WORDS = {"a", "an", "on", "background"} | {w for r in RELATIONS for w in r.split()}
WORDS |= {*SIZES, *COLOURS, *SHAPES, *BACKGROUNDS}
LOOKS = list(itertools.product(COLOURS, SHAPES))
RED_CIRCLE = SceneObject(size="small", colour="red", shape="circle")
BLUE_STAR = SceneObject(size="large", colour="blue", shape="star")
PAIR = Scene(objects=(RED_CIRCLE, BLUE_STAR), relation="above", background="grey")


@pytest.fixture(scope="module")
def trained():
    """The first training items as (scene, layout, caption)."""
    source = SceneSource(seed=0)
    return [source.example(i) for i in range(800)]


def scenes(n, split="train", seed=0):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split) for _ in range(n)]


def test_an_item_depends_on_seed_split_and_index_alone():
    source = SceneSource(seed=3)
    forward = [source[i] for i in range(6)]
    backward = [SceneSource(seed=3)[i] for i in reversed(range(6))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a["caption"] == b["caption"]
        np.testing.assert_array_equal(a["image"], b["image"])
    assert any(source[i]["caption"] != SceneSource(seed=4)[i]["caption"] for i in range(6))
    far = source[len(source) - 1]
    assert far["image"].shape == (64, 64, 3)
    assert far["image"].dtype == np.uint8


def test_index_out_of_range():
    with pytest.raises(InputError, match="index"):
        SceneSource(seed=0)[-1]


def test_held_out_pairs_never_occur_in_training(trained):
    blocks = SceneSource(seed=0, variations=4)
    for scene, _, _ in [*trained, *(blocks.example(i) for i in range(400))]:
        assert not any(is_held_out_pair(obj.colour, obj.shape) for obj in scene.objects)
        assert split_of(scene) == "train"


def test_the_held_out_pairs_are_the_four_promised():
    assert {pair for pair in LOOKS if is_held_out_pair(*pair)} == {
        ("purple", "star"),
        ("green", "ring"),
        ("orange", "cross"),
        ("blue", "triangle"),
    }


def test_a_mirrored_relation_is_the_same_arrangement_and_split():
    mirror = Scene(objects=(BLUE_STAR, RED_CIRCLE), relation="below", background="grey")
    assert arrangement(mirror) == arrangement(PAIR)
    draws = np.linspace(0.1, 0.9, NUM_LAYOUT_UNIFORMS)
    np.testing.assert_array_equal(
        render(mirror, layout_objects(mirror, draws)), render(PAIR, layout_objects(PAIR, draws))
    )
    for scene in scenes(60, "validation"):
        if scene.relation:
            flipped = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
            other = Scene(
                objects=scene.objects[::-1],
                relation=flipped[scene.relation],
                background=scene.background,
            )
            assert split_of(other) == "validation"


def test_reserved_shares():
    pairs = [pair for pair in LOOKS if not is_held_out_pair(*pair)]
    for colour, shape in pairs:
        splits = [
            split_of(
                Scene(
                    objects=(SceneObject(size=s, colour=colour, shape=shape),),
                    background=background,
                )
            )
            for s in SIZES
            for background in BACKGROUNDS
        ]
        assert sorted(splits) == ["train"] * 5 + ["validation"]
    reserved = [
        split_of(
            Scene(
                objects=(
                    SceneObject(colour=a[0], shape=a[1]),
                    SceneObject(colour=b[0], shape=b[1]),
                ),
                relation="above",
            )
        )
        for a, b in itertools.permutations(pairs, 2)
    ]
    assert 0.08 < reserved.count("validation") / len(reserved) < 0.12


def test_captions_have_a_closed_vocabulary(trained):
    assert {word for _, _, text in trained for word in text.split()} == WORDS
    assert describe(PAIR) == "a small red circle above a large blue star on a grey background"
    orange = Scene(objects=(SceneObject(colour="orange", shape="ring"),))
    assert describe(orange) == "an orange ring"


def test_captions_are_parsed_back(trained):
    scenes = [prompt.scene for kind in KINDS for prompt in sample_prompts(100, 5, kind)]
    for scene in (*scenes, *(scene for scene, _, _ in trained)):
        assert parse_caption(describe(scene)) == scene
    assert parse_caption(" A red Circle\n") == Scene(
        objects=(SceneObject(colour="red", shape="circle"),)
    )


@pytest.mark.parametrize(
    "text",
    [
        *("", "red circle", "a red circle and a blue star", "a castle", "a red circle above"),
        *("a large red", "a red circle on a black background", "a red circle above a red circle"),
    ],
)
def test_other_texts_are_no_captions(text):
    with pytest.raises(InputError):
        parse_caption(text)


def test_captions_say_what_is_there(trained):
    open_sizes = open_backgrounds = 0
    for scene, _, words in trained:
        open_sizes += not any(size in words for size in SIZES)
        open_backgrounds += "background" not in words
        if "background" in words:
            assert words.endswith(f"on a {scene.background} background")
        for obj in scene.objects:
            assert f"{obj.colour} {obj.shape}" in words
        assert (scene.relation or "") in words
    assert 0.1 < open_sizes / len(trained) < 0.3
    assert 0.3 < open_backgrounds / len(trained) < 0.5


@pytest.mark.parametrize("split", SPLITS)
def test_things_keep_apart_and_inside_and_along_their_axis(split):
    rng = np.random.default_rng(0)
    for scene in scenes(150, split):
        layout = layout_objects(scene, rng.random(NUM_LAYOUT_UNIFORMS).round())
        masks = [
            coverage(obj.shape, centre, radius) > 0.25
            for obj, centre, radius in zip(scene.objects, layout.centres, layout.radii, strict=True)
        ]
        edge = np.ones((CANVAS, CANVAS), bool)
        edge[1:-1, 1:-1] = False
        assert not any((mask & edge).any() for mask in masks)
        if scene.relation is None:
            continue
        assert not (masks[0] & masks[1]).any()
        (ax, ay), (bx, by) = layout.centres
        axis = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}
        other = abs(by - ay) if scene.relation in ("left of", "right of") else abs(bx - ax)
        assert axis[scene.relation] > 3 * other


@pytest.mark.parametrize("shape", SHAPES)
def test_extents_are_those_of_the_drawing(shape):
    mask = coverage(shape, (32.0, 32.0), 13.0)
    rows, columns = np.nonzero(mask > 0.25)
    half_width, half_height = (13.0 * extent for extent in SHAPE_SDFS[shape].extent)
    assert (columns.max() + 1 - columns.min()) / 2 == pytest.approx(half_width, abs=1.1)
    assert (rows.max() + 1 - rows.min()) / 2 == pytest.approx(half_height, abs=1.1)
    assert (columns.max() + 1 + columns.min()) / 2 == pytest.approx(32, abs=0.6)
    assert (rows.max() + 1 + rows.min()) / 2 == pytest.approx(32, abs=1.1)


def test_coverage_has_the_area_of_the_shape():
    r = 10.0
    areas = {
        "circle": np.pi * r**2,
        "square": (1.8 * r) ** 2,
        "ring": 0.75 * np.pi * r**2,
        "cross": (8 * 0.36 - 4 * 0.36**2) * r**2,
        "triangle": 3 * np.sqrt(3) / 4 * (1.22 * r) ** 2,
        "star": 10 * 0.5 * 1.15**2 * 0.47 * np.sin(np.pi / 5) * r**2,
    }
    for shape, area in areas.items():
        assert coverage(shape, (31.3, 32.8), r).sum() == pytest.approx(area, rel=0.02), shape


@pytest.mark.parametrize("shape", SHAPES)
def test_the_area_grows_with_the_size_in_pixels(shape):
    small = coverage(shape, (31.3, 32.8), 10.0)
    large = coverage(shape, (62.6, 65.6), 20.0, 128)
    assert large.shape == (128, 128)
    assert large.sum() == pytest.approx(4 * small.sum(), rel=0.01)
    halved = large.reshape(64, 2, 64, 2).mean((1, 3))
    assert np.abs(halved - small).max() < 0.3  # the ramp at the edge is half as wide


@pytest.mark.parametrize("side", [32, 64])
def test_the_size_of_the_images_changes_nothing_else(side):
    small, large = (SceneSource(seed=3, variations=2, size=size) for size in (side, 2 * side))
    for i in range(4):
        ours, theirs = small[i], large[i]
        assert (ours["caption"], ours["scene"]) == (theirs["caption"], theirs["scene"])
        assert theirs["image"].shape == (2 * side, 2 * side, 3)
        halved = theirs["image"].reshape(side, 2, side, 2, 3).mean((1, 3))
        assert np.abs(halved - ours["image"]).mean() < 1


def test_images_too_small_to_show_shapes_are_refused():
    with pytest.raises(InputError, match="size: got 16"):
        SceneSource(seed=3, size=16)


def test_the_image_has_the_palette_and_soft_edges():
    image = render(PAIR, ObjectLayout(centres=((32.0, 14.0), (32.0, 46.0)), radii=(8.0, 13.0)))
    assert tuple(image[0, 0]) == BACKGROUND_RGB["grey"]
    assert tuple(image[14, 32]) == OBJECT_RGB["red"]
    assert tuple(image[46, 32]) == OBJECT_RGB["blue"]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20


def test_sizes_are_clearly_apart():
    assert RADII["large"][0] > 1.35 * RADII["small"][1]
    assert MARGIN > 1


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("variations", [2, 4, 8])
def test_blocks_hold_different_images_and_captions(split, variations):
    source = SceneSource(seed=1, split=split, variations=variations)
    for block in range(20):
        items = [source[block * variations + i] for i in range(variations)]
        assert len({item["caption"] for item in items}) == variations
        assert len({item["image"].tobytes() for item in items}) == variations


def test_variations_are_minimal_and_of_every_kind():
    rng = np.random.default_rng(0)
    pair = replace(PAIR, relation="left of")  # its swaps are training scenes as well
    kinds = set()
    for _ in range(15):
        for other in sample_variations(pair, 7, rng):
            assert split_of(other) == "train"
            assert len(other.objects) == 2
            swapped = [sorted(getattr(t, n) for t in other.objects) for n in ("colour", "shape")]
            same = [sorted(getattr(t, n) for t in pair.objects) for n in ("colour", "shape")]
            changed = [
                (i, name)
                for i in (0, 1)
                for name in ("size", "colour", "shape")
                if getattr(other.objects[i], name) != getattr(pair.objects[i], name)
            ]
            if len(changed) == 2:
                assert swapped == same
                kinds.add(f"swap {changed[0][1]}")
            elif changed:
                kinds.add(changed[0][1])
            kinds |= {
                n for n in ("relation", "background") if getattr(other, n) != getattr(pair, n)
            }
    expected = {"size", "colour", "shape", "relation", "background", "swap colour", "swap shape"}
    assert kinds == expected


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_never_training_captions(kind, trained):
    prompts = sample_prompts(100, 0, kind)
    assert prompts == sample_prompts(100, 0, kind)
    assert len(prompts[0].scene.objects) == (1 if kind.endswith("one") else 2)
    assert not {words for _, _, words in trained} & {prompt.text for prompt in prompts}
    assert all(describe(prompt.scene) == prompt.text for prompt in prompts)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="did you mean 'circle'"):
        SceneObject(colour="red", shape="circel")
    with pytest.raises(InputError, match="of different colour or shape"):
        Scene(objects=(RED_CIRCLE, RED_CIRCLE), relation="above")
    with pytest.raises(InputError, match="relation"):
        Scene(objects=(RED_CIRCLE,), relation="above")
    with pytest.raises(InputError, match="scene: got no background, expected"):
        render(Scene(objects=(RED_CIRCLE,)))
    with pytest.raises(InputError, match=r"scene: got .*size.*, expected"):
        render(Scene(objects=(SceneObject(colour="red", shape="ring"),), background="pink"))
    with pytest.raises(InputError, match="variations"):
        SceneSource(seed=0, variations=9)
