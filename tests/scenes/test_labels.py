"""Attributes of scenes and of prompts: every caption says what its scene shows."""

import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.scenes.captions import describe
from jaxdiff.scenes.labels import (
    ATTRIBUTES,
    collate_attributes,
    scene_attributes,
    text_attributes,
)
from jaxdiff.scenes.source import KINDS, SceneSource, sample_prompts
from jaxdiff.scenes.specification import SPLITS, Scene, SceneObject

RED_CIRCLE = SceneObject(size="small", colour="red", shape="circle")
BLUE_STAR = SceneObject(size="large", colour="blue", shape="star")


def told(known):
    """What is known as text: name -> label, or the labels known to be there and not."""
    answers = {}
    for group in ATTRIBUTES.groups:
        at = ATTRIBUTES.slices[group.name]
        targets, which = known.targets[at], known.known[at]
        if not which.any():
            continue
        if group.exclusive:
            assert which.all()
            (answers[group.name],) = np.array(group.labels)[targets]
        else:
            there = {*np.array(group.labels)[targets & which].tolist()}
            answers[group.name] = (
                there,
                {*np.array(group.labels)[which].tolist()} == {*group.labels},
            )
    return answers


def test_a_full_scene_is_known_in_everything():
    scene = Scene(objects=(RED_CIRCLE, BLUE_STAR), relation="below", background="grey")
    known = scene_attributes(scene)
    assert known.known.all()
    assert told(known) == {
        "background": "grey",
        "layout": "above",
        "first_size": "large",
        "first_colour": "blue",
        "first_shape": "star",
        "second_size": "small",
        "second_colour": "red",
        "second_shape": "circle",
        "sizes": ({"small", "large"}, True),
        "colours": ({"red", "blue"}, True),
        "shapes": ({"circle", "star"}, True),
    }


def test_one_thing_leaves_the_second_place_unknown():
    known = told(scene_attributes(Scene(objects=(BLUE_STAR,), background="white")))
    assert known["layout"] == "one"
    assert known["first_shape"] == "star"
    assert known["colours"] == ({"blue"}, True)
    assert not any(name.startswith("second") for name in known)


def test_what_a_scene_leaves_open_is_unknown():
    open_size = SceneObject(colour="red", shape="circle")
    known = told(scene_attributes(Scene(objects=(open_size, BLUE_STAR), relation="left of")))
    assert {"background", "first_size", "sizes"}.isdisjoint(known)
    assert known["second_size"] == "large"
    assert known["shapes"] == ({"circle", "star"}, True)


def agree(text, scene):
    """What a text tells is what the scene shows; returns the names of what it tells."""
    by_text, by_scene = text_attributes(text), scene_attributes(scene)
    assert not (by_text.known & ~by_scene.known).any(), text
    np.testing.assert_array_equal(
        by_text.targets[by_text.known], by_scene.targets[by_text.known], err_msg=text
    )
    return {*told(by_text)}


@pytest.mark.parametrize("split", SPLITS)
def test_every_caption_tells_what_its_scene_shows(split):
    source = SceneSource(seed=3, split=split)
    for scene, _, text in (source.example(i) for i in range(400)):
        names = agree(text, scene)
        objects = ("first", "second")[: len(scene.objects)]
        wanted = {"layout"} | {f"{p}_{kind}" for p in objects for kind in ("colour", "shape")}
        sizes = {name for name in names if name.endswith("_size")}
        assert len(sizes) == sum(word in text.split() for word in ("small", "large")) or (
            text.split().count("small") == 2 or text.split().count("large") == 2
        )
        if "background" in text:
            wanted |= {"background"}
        assert names == wanted | sizes


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_tells_all_that_its_open_scene_says(kind):
    for prompt in sample_prompts(100, 5, kind):
        names = agree(prompt.text, prompt.scene)
        by_scene = {n for n in told(scene_attributes(prompt.scene)) if not n.endswith("s")}
        assert names == by_scene


def test_a_full_description_leaves_nothing_in_its_places_open():
    for scene, _, _ in (SceneSource(seed=4).example(i) for i in range(200)):
        names = agree(describe(scene), scene)
        assert len(names) == (8 if len(scene.objects) == 2 else 5)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A Red CIRCLE.", {"layout": "one", "first_colour": "red", "first_shape": "circle"}),
        ("(red:1.3) ring", {"layout": "one", "first_colour": "red", "first_shape": "ring"}),
        ("a white background", {"background": "white"}),
        ("a ring on a dark background", {"layout": "one", "first_shape": "ring"}),
        ("a ring on a pink and a grey background", {"shapes": ({"ring"}, False)}
            | {"background": "grey"}),
        # what is foreign leaves open what it stands for
        ("a red dog", {"colours": ({"red"}, False)}),
        ("a red dog above a small star", {"layout": "above", "first_colour": "red",
            "second_size": "small", "second_shape": "star"}),
        ("a dog right of a star", {"layout": "left of", "first_shape": "star"}),
        # places that are not understood
        ("red and blue", {"colours": ({"red", "blue"}, False)}),
        ("a red circle and a blue square", {"colours": ({"red", "blue"}, False),
            "shapes": ({"circle", "square"}, False)}),
        ("a red circle above a ring above a small cross", {"colours": ({"red"}, False),
            "shapes": ({"circle", "ring", "cross"}, False), "sizes": ({"small"}, False)}),
    ],
)  # fmt: skip
def test_other_texts(text, wanted):
    assert told(text_attributes(text)) == wanted


@pytest.mark.parametrize("text", ["", "a photo of a cat", "left", "a blueish starfish"])
def test_a_text_without_attributes_is_refused(text):
    with pytest.raises(InputError, match=r"prompt: got '.*', expected words .*: small, large, red"):
        text_attributes(text)


def test_batches_have_images_and_masks():
    source = SceneSource(seed=0)
    items = [source[i] for i in range(3)]
    batch = collate_attributes(items)
    assert batch["image"].shape == (3, 64, 64, 3)
    for i, item in enumerate(items):
        expected = scene_attributes(item["scene"])
        np.testing.assert_array_equal(batch["targets"][i], expected.targets)
        np.testing.assert_array_equal(batch["known"][i], expected.known)
