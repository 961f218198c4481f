"""What the network is told of texts and sizes: which encoder reads what, and which stream."""

import dataclasses

import numpy as np
import pytest
from transformers import CLIPTokenizer

from jaxdiff.core.errors import InputError
from jaxdiff.families.extras import ExtraInputs
from jaxdiff.families.flux import FLUX, SCHNELL
from jaxdiff.families.stable_diffusion import SD, SDXL, SDXL_REFINER
from jaxdiff.guidance.base import Stream
from jaxdiff.pipeline.conditioning import PromptTokenizers
from jaxdiff.pipeline.defaults import Defaults
from jaxdiff.pipeline.options import Options
from jaxdiff.pipeline.prompts import PromptTokenizer
from jaxdiff.pipeline.request import Request, resolve

BASE, REFINER, SD1 = SDXL, SDXL_REFINER, SD


def request(prompt="a", family=BASE, **options):
    defaults = Defaults(sampler="ddim", height=16, width=24)
    return resolve(defaults, prompt, family=family, vae_scale_factor=2, **options)


def time_ids(family, asked, prompted):
    """The time ids of each image of a request."""
    inputs = ExtraInputs(
        size=(asked.height, asked.width),
        options=[each.extras for each in asked],
        prompted=tuple(prompted),
        texts=[[each.prompt] * len(prompted) for each in asked],
        guidance_scales=np.asarray(asked.guidance_scales),
        latent_size=(asked.height // 2, asked.width // 2),
        noise=np.zeros,
        encode=lambda images: images,
        downsample=lambda masks: masks,
    )
    return family.request_conditioning(inputs)["time_ids"]


def test_every_option_is_a_field_of_the_request_and_the_other_way_round():
    images = {"image", "mask", "noise", "image_prompt", "low_resolution"}
    assert {*Options.__annotations__, "prompt", "extras", *images} == {
        field.name for field in dataclasses.fields(Request)
    }


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="guidence_scale"):
        request(guidence_scale=3.0)


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({}, (None, "a"), (None, "a")),
        ({"negative_prompt": "n"}, ("n", "a"), ("n", "a")),
        ({"prompt_2": "b"}, (None, "a"), (None, "b")),
        ({"prompt_2": ""}, (None, "a"), (None, "a")),
        ({"negative_prompt": "", "negative_prompt_2": "m"}, ("", "a"), ("m", "a")),
        ({"negative_prompt": "n", "negative_prompt_2": ""}, ("n", "a"), ("n", "a")),
    ],
)
def test_texts_of_two_encoders(options, first, second):
    assert request(**options)[0].prompts_for_encoder()[:2] == (first, second)


def test_second_prompts_image_by_image():
    asked = request(["a", "b", "c"], prompt_2=["x", None, "z"], negative_prompt="n")
    assert [each.prompts_for_encoder()[1] for each in asked] == [
        ("n", "x"),
        ("n", "b"),
        ("n", "z"),
    ]
    assert [asked[i].to_metadata().get("prompt_2") for i in range(3)] == ["x", None, "z"]
    assert len(request("a", prompt_2=["x", "y"]).prompts) == 2
    assert "negative_prompt_2" not in asked[0].to_metadata()


@pytest.fixture(scope="module")
def tokenizers():
    tokens = ["!", *"abcdef", *(f"{c}</w>" for c in "abcdef"), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=6)
    both = dict.fromkeys(("text_encoder", "text_encoder_2"), PromptTokenizer(tokenizer))
    return PromptTokenizers(BASE, both)


CFG = [Stream(prompt_source="negative"), Stream()]


def test_each_encoder_reads_its_own_text(tokenizers):
    """Words end the letter: a</w> is 7, b</w> 8, ...; a long text lengthens those of all."""
    asked = request("a", prompt_2="b", negative_prompt="c", negative_prompt_2="d")
    words = tokenizers.tokenize(asked, CFG)
    assert [ids[0, :, 0, 1].tolist() for ids in words.ids] == [[9, 7], [10, 8]]
    assert not words.zero_out.any()
    asked = request("a", prompt_2="a b c d e")
    words = tokenizers.tokenize(asked, CFG)
    assert [ids.shape for ids in words.ids] == [(1, 2, 2, 6)] * 2
    assert words.zero_out.tolist() == [[True, False]]
    assert tokenizers.num_chunks([*asked, *request("a")], CFG) == [2, 1]


SIZE, CROP = [16, 24], [4, 2]


@pytest.mark.parametrize(
    ("options", "null", "own"),
    [
        ({}, [*SIZE, 0, 0, *SIZE], [*SIZE, 0, 0, *SIZE]),
        ({"crop_top_left": (4, 2)}, [*SIZE, *CROP, *SIZE], [*SIZE, *CROP, *SIZE]),
        (
            {"crop_top_left": (4, 2), "negative_original_size": (8, 9)},
            [8, 9, 0, 0, *SIZE],
            [*SIZE, *CROP, *SIZE],
        ),
        (
            {"original_size": (5, 6), "negative_target_size": (8, 9)},
            [5, 6, 0, 0, 8, 9],
            [5, 6, 0, 0, *SIZE],
        ),
        ({"negative_crop_top_left": (1, 2)}, [*SIZE, 1, 2, *SIZE], [*SIZE, 0, 0, *SIZE]),
    ],
)
def test_numbers_of_the_base_model(options, null, own):
    asked = request(["a", "b"], **options)
    np.testing.assert_array_equal(time_ids(BASE, asked, [False, True]), [[null, own]] * 2)
    np.testing.assert_array_equal(time_ids(BASE, asked, [True]), [[own]] * 2)


def test_numbers_of_the_refiner():
    asked = request(
        family=REFINER, crop_top_left=(4, 2), aesthetic_score=7, negative_original_size=(8, 9)
    )
    want = [[[8, 9, 0, 0, 2.5], [*SIZE, *CROP, 7]]]
    np.testing.assert_array_equal(time_ids(REFINER, asked, [False, True]), want)
    assert asked[0].to_metadata()["crop_top_left"] == [4, 2]
    assert SD1.extras == ()


def test_a_scale_that_the_models_own_rule_has_no_use_for_is_refused():
    """schnell has no guidance at all; the network of dev takes the scale."""
    asked = {"prompt": "a", "vae_scale_factor": 2}
    own = Defaults(sampler="ddim", height=16, width=24, guidance="none", guidance_scale=1.0)
    message = (
        "^guidance_scale: got 5.0 with guidance none, the rule of FLUX.1 schnell, which has no"
    )
    for scale in (5.0, [1.0, 5.0]):
        with pytest.raises(InputError, match=message):
            resolve(own, family=SCHNELL, guidance_scale=scale, **asked)
    for scale in (0.0, 1.0, None):  # the conditional model, also as diffusers calls it
        assert len(resolve(own, family=SCHNELL, guidance_scale=scale, **asked)) == 1
    chosen = resolve(own, family=SCHNELL, guidance_scale=5.0, guidance="cfg", **asked)
    assert list(chosen.guidance_scales) == [5.0]
    distilled = resolve(own, family=FLUX, guidance_scale=5.0, **asked)
    assert list(distilled.guidance_scales) == [5.0]


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (
            REFINER,
            {"prompt_2": "b"},
            "prompt_2: got 'b', expected none for a model",
        ),
        (
            SD1,
            {"negative_prompt_2": "b"},
            "negative_prompt_2: got 'b', expected none for a model without a second",
        ),
        (BASE, {"negative_prompt_2": "b"}, "negative_prompt_2: got 'b' without a negative_prompt"),
        (SD1, {"target_size": (1, 2)}, r"target_size: got \(1, 2\), expected none"),
        (SD1, {"negative_target_size": (1, 2)}, r"negative_target_size: got \(1, 2\), expected no"),
        (
            BASE,
            {"aesthetic_score": 7},
            "aesthetic_score: got 7, .*: it is read by Stable Diffusion XL refiner",
        ),
        (REFINER, {"target_size": (1, 2)}, r"target_size: got \(1, 2\), expected none for Stab"),
        (BASE, {"original_size": (-1, 2)}, "original_size: got -1, expected"),
    ],
)
def test_what_would_not_be_heard_is_refused(recipe, options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        request(family=recipe, **options)


def test_what_is_heard_is_fine():
    sizes = {"original_size": (1, 2), "negative_crop_top_left": (1, 2)}
    request(prompt_2="b", negative_prompt="", negative_prompt_2="c", **sizes)
    request(family=dataclasses.replace(BASE, zero_uncond=False), negative_prompt_2="c")
    request(family=REFINER, prompt_2="", **sizes)
    request(family=SD1, crop_top_left=(0, 0), aesthetic_score=6.0)
