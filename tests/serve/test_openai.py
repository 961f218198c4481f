"""OpenAI's images API, with its own client."""

import json

import numpy as np
import openai
import pytest
from serving import WAIT, image_of, png


@pytest.fixture
def images(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT
    ) as own:
        yield own.images


def test_images_are_those_of_a_call(pipe, images):
    answer = images.generate(
        model="tiny",
        prompt="a blue star",
        n=2,
        size="16x32",
        extra_body={"seed": 5, "num_inference_steps": 3, "guidance_scale": 2.0},
    )
    plain = pipe(
        "a blue star", seed=[5, 6], steps=3, guidance_scale=2.0, width=16, height=32, output="numpy"
    )
    assert [each.seed for each in answer.data] == [5, 6]
    for each, expected in zip(answer.data, plain.images, strict=True):
        found = image_of(each.b64_json)
        assert found.format == "PNG"
        assert np.abs(np.asarray(found).astype(int) - expected).max() <= 1
    assert (answer.size, answer.output_format, answer.background) == ("16x32", "png", "opaque")
    assert answer.usage.output_tokens == 2 * 8 * 16
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.input_tokens == answer.usage.input_tokens_details.text_tokens > 0


def test_other_formats(images):
    sizes = {}
    for form, quality in (("jpeg", 10), ("jpeg", 100), ("webp", 10), ("webp", None)):
        options = {} if quality is None else {"output_compression": quality}
        answer = images.generate(
            prompt="a star", size="64x64", output_format=form, extra_body={"seed": 1}, **options
        )
        assert image_of(answer.data[0].b64_json).format == form.upper()
        assert answer.output_format == form
        sizes[form, quality] = len(answer.data[0].b64_json)
    assert sizes["jpeg", 10] < sizes["jpeg", 100]


def test_seeds_are_random_by_default(images):
    answers = [images.generate(prompt="a star", size="auto") for _ in range(2)]
    assert answers[0].data[0].seed != answers[1].data[0].seed
    assert answers[0].size == "16x16"


def test_partial_images(pipe, images):
    options = {"seed": 3, "num_inference_steps": 8}
    events = list(
        images.generate(
            prompt="a star", stream=True, partial_images=3, size="16x16", extra_body=options
        )
    )
    kinds = ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert len({event.b64_json for event in events}) == 4
    last = events[-1]
    assert (last.size, last.quality, last.background) == ("16x16", "auto", "opaque")
    assert last.usage.output_tokens == 64
    assert last.created_at > 1e9
    plain = pipe("a star", seed=3, steps=8, output="numpy").images[0]
    assert np.abs(np.asarray(image_of(last.b64_json)).astype(int) - plain).max() <= 1


def test_a_stream_of_two_images(client):
    fields = {"prompt": "a star", "n": 2, "stream": True, "seed": 1}
    answer = client.post("/v1/images/generations", json=fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:6] == "data: "]
    assert [event["type"] for event in events] == ["image_generation.completed"] * 2
    assert {event["seed"] for event in events} == {1, 2}


COLOURS = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)
HOLE = np.zeros((16, 16), bool)
HOLE[4:12, 4:12] = True


def test_edits_by_strength(pipe, images):
    options = {"seed": 2, "strength": 0.5, "num_inference_steps": 4}
    answer = images.edit(image=png(COLOURS), prompt="a star", n=2, extra_body=options, size="auto")
    plain = pipe("a star", image=COLOURS, seed=[2, 3], strength=0.5, steps=4, output="numpy")
    for each, expected in zip(answer.data, plain.images, strict=True):
        found = np.asarray(image_of(each.b64_json)).astype(int)
        assert np.abs(found - expected).max() <= 1
    assert answer.usage.input_tokens_details.image_tokens == 64


@pytest.mark.parametrize("where", ["transparent", "grey", "image"])
def test_edits_of_what_is_masked(pipe, images, where):
    alpha = np.where(HOLE, 0, 255).astype(np.uint8)[..., None]
    image = COLOURS
    mask = {"mask": png(np.concatenate([COLOURS, alpha], axis=-1))}
    if where == "grey":
        mask = {"mask": png(np.where(HOLE, 255, 0).astype(np.uint8))}
    elif where == "image":
        image, mask = np.concatenate([COLOURS, alpha], axis=-1), {}
    answer = images.edit(
        image=[png(image)], prompt="a star", size="16x16", extra_body={"seed": 2}, **mask
    )
    plain = pipe("a star", image=COLOURS, mask=HOLE, seed=2, output="numpy").images[0]
    found = np.asarray(image_of(answer.data[0].b64_json)).astype(int)
    assert np.abs(found - plain).max() <= 1


def test_a_stream_of_an_edit(images):
    events = list(
        images.edit(
            image=png(COLOURS), prompt="a star", stream=True, partial_images=1, size="16x16"
        )
    )
    assert [each.type for each in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_models(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as own:
        assert [model.id for model in own.models.list()] == ["tiny"]
        assert own.models.retrieve("tiny").owned_by == "jaxdiff"
        with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
            own.models.retrieve("owner/other")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quality": "high"}, "quality: got 'high', which has no effect here, expected auto or"),
        ({"style": "vivid"}, "style: got 'vivid', which has no effect here, expected none"),
        ({"background": "transparent"}, "background: got 'transparent'"),
        ({"moderation": "low"}, "moderation: got 'low'"),
        ({"response_format": "url"}, "response_format: got 'url'"),
        ({"model": "dall-e-3"}, "model: got 'dall-e-3', expected 'tiny'"),
        ({"size": "big"}, "size: got 'big', expected WIDTHxHEIGHT"),
        ({"size": "17x16"}, "width: got 17, expected a multiple of 2"),
        ({"size": "4096x4096"}, "size: got 4096x4096, which is 16777216 pixels"),
        ({"num_inference_steps": 41}, "steps: got 41, expected at most 40"),
        ({"n": 11}, "n: got 11"),
        ({"n": "2"}, "n: got '2'"),
        ({"n": True}, "n: got True"),
        ({"prompt": ""}, "prompt: got ''"),
        ({"prompt": "a" * 201}, "prompt: got 201 characters, expected at most 200"),
        ({"negative_prompt": "a" * 201}, "prompt: got 201 characters"),
        ({"prompt": "a star <lora:ink:1>"}, "<lora:ink:1>"),
        ({"prompt": "\ud800"}, "prompt: "),
        ({"seed": 2**32}, "seed: got 4294967296"),
        ({"guidance_scale": 2.0, "true_cfg_scale": 2.0}, "two names of one thing"),
        ({"guidance_scale": -1.0}, "guidance_scale: got -1.0"),
        ({"sampler": "best"}, "sampler: got 'best', expected one of"),
        ({"guidance": "autoguidance"}, "guidance_model"),
        ({"guidance": "file:/etc/passwd"}, "guidance: file: got"),
        ({"loras": ["ink"]}, "loras: got 'ink', which cannot be applied to a single request"),
        ({"loras": ["../ink"]}, "loras: got '../ink', expected one of ink"),
        ({"output_format": "png", "output_compression": 50}, "output_compression: got 50"),
        ({"output_format": "gif"}, "output_format: got 'gif'"),
        ({"partial_images": 2}, "partial_images: got 2 without stream"),
        ({"priority": 11}, "priority: got 11"),
        ({"shiny": 1}, "shiny: got an unknown field"),
        ({"image": "/etc/passwd"}, "image: got an unknown field"),
    ],
)
def test_one_sentence_for_what_is_not_served(client, fields, message):
    body = json.dumps({"prompt": "a star", **fields})
    answer = client.post(
        "/v1/images/generations", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == (404 if "model" in fields else 400)
    error = answer.json()["error"]
    assert message in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("files", "fields", "message"),
    [
        ({}, {}, "image: got none"),
        ({"image": b"/etc/passwd"}, {}, "image: got no image, expected a PNG, JPEG or WebP file"),
        ({"image": png(COLOURS)[:200]}, {}, "image: got a damaged image"),
        ({"image": png(COLOURS), "mask": png(COLOURS[:8])}, {}, "mask: got 16x8, expected"),
        ({"image": png(COLOURS), "image[]": png(COLOURS)}, {}, "image: got several"),
        ({"image": png(COLOURS), "prompt": b"x"}, {}, "got a file, expected text"),
        ({"image": png(COLOURS)}, {"mask": "/etc/passwd"}, "mask: got text, expected a file"),
        ({"image": png(COLOURS)}, {"input_fidelity": "high"}, "input_fidelity: got 'high'"),
        ({"image": png(COLOURS)}, {"strength": "2"}, "strength: got '2'"),
        ({"image": png(COLOURS)}, {"other": "2"}, "other: got an unknown field"),
        ({"image": png(COLOURS)}, {"n": ["1", "2"]}, "got it twice"),
        ({"image": png(COLOURS)}, {"loras": ["ink"]}, "loras: got 'ink'"),
    ],
)
def test_one_sentence_for_edits_that_are_not_served(client, files, fields, message):
    uploads = {name: (f"{name}.png", data) for name, data in files.items()}
    data = {"prompt": "a star"} if "prompt" not in files else {}
    answer = client.post("/v1/images/edits", files=uploads or None, data={**data, **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_an_image_that_is_not_finite_is_an_error_of_its_own(images, not_finite):
    with pytest.raises(openai.InternalServerError, match="not finite") as caught:
        images.generate(prompt="a star", extra_body={"seed": 13})
    assert caught.value.code == "image_not_finite"
    assert images.generate(prompt="a star", extra_body={"seed": 12}).data[0].b64_json
    with pytest.raises(openai.APIError, match="not finite"):
        list(images.generate(prompt="a star", stream=True, extra_body={"seed": 13}))
