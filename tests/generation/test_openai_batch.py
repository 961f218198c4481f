import json

import pytest

from jaxdiff.generation.openai_batch import error_entry, response_entry
from jaxdiff.generation.prompt_spec import LoRA, PromptSpec
from jaxdiff.generation.prompt_stream import BadLine, PromptLine, read_prompts

REQUEST = {"custom_id": "r", "method": "POST", "url": "/v1/images/generations"}


def read(path, body, changes=None):
    path.write_text(json.dumps({**REQUEST, "body": {"prompt": "a", **body}} | (changes or {})))
    (line,) = read_prompts(path)
    return line


def test_a_request_with_everything(tmp_path):
    path = tmp_path / "p.jsonl"
    body = {
        "model": "scenes",
        "user": "u",
        "n": 10,
        "size": "128x64",
        "quality": "auto",
        "background": "auto",
        "moderation": None,
        "response_format": "b64_json",
        "output_format": "webp",
        "output_compression": 80,
        "negative_prompt": "b",
        "num_inference_steps": 9,
        "guidance_scale": 2,
        "seed": 5,
        "sampler": "euler",
        "guidance": "cfg",
        "loras": ["/x:2"],
    }
    spec = PromptSpec(
        prompt="a",
        num_images=10,
        width=128,
        height=64,
        negative_prompt="b",
        steps=9,
        guidance_scale=2,
        seed=5,
        sampler="euler",
        guidance="cfg",
        loras=(LoRA("/x", 2.0),),
    )
    expected = PromptLine(0, f"{path}:1", spec, "r", "scenes", "webp", 80)
    assert read(path, body) == expected
    plain = read(path, {"size": "auto"})
    assert plain == PromptLine(0, f"{path}:1", PromptSpec(prompt="a", num_images=1), "r")
    assert read(path, {"output_compression": 100}).quality == 100


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 11}, "body: n: got 11, expected a number from 1 to 10"),
        ({"n": "2"}, "body: n: got '2', expected an integer"),
        ({"size": "big"}, "body: size: got 'big', expected 'auto' or WIDTHxHEIGHT"),
        ({"size": "0x64"}, "body: size: got '0x64'"),
        ({"response_format": "url"}, "body: response_format: got 'url', expected 'b64_json'"),
        ({"quality": "high"}, "body: quality: got 'high', which has no effect here"),
        ({"style": "vivid"}, "body: style: got 'vivid', which has no effect here"),
        ({"background": "opaque"}, "body: background: got 'opaque', which has no effect here"),
        ({"moderation": "low"}, "body: moderation: got 'low', which has no effect here"),
        ({"output_format": "gif"}, "body: output_format: got 'gif', expected one of png"),
        ({"output_format": "webp", "output_compression": 101}, "body: output_compression: got 101"),
        ({"output_compression": 50}, "body: output_compression: got 50 with output_format png"),
        ({"promt": "x"}, "body: field: got 'promt', .*did you mean 'prompt'"),
        ({"prompt": None}, "body: got no field 'prompt'"),
        ({"prompt": "x" * 32_001}, "body: prompt: got 32001 characters"),
        ({"num_inference_steps": 0}, "steps: got 0"),
    ],
)
def test_bad_bodies(tmp_path, body, message):
    path = tmp_path / "p.jsonl"
    line = read(path, body)
    assert isinstance(line, BadLine)
    assert line.custom_id == "r"
    with pytest.raises(AssertionError, match=f"^{path}:1: {message}"):
        raise AssertionError(line.reason)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "/v1/images/edits"}, "edits are not supported"),
        ({"url": "/v1/chat/completions"}, "url: got '/v1/chat"),
        ({"method": "GET"}, "method: got 'GET', expected one of POST"),
        ({"custom_id": 3}, "custom_id: got 3, expected a string"),
        ({"body": []}, r"body: got \[\], expected an object"),
        ({"extra": 1}, "field: got 'extra'"),
    ],
)
def test_bad_requests(tmp_path, changes, message):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(read(tmp_path / "p.jsonl", {}, changes).reason)


def test_a_request_that_lacks_something(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"custom_id": "r", "prompt": "a"}\n{"custom_id": "r", "body": {}}\n')
    first, second = read_prompts(path)
    assert "field: got 'prompt', expected one of custom_id" in first.reason
    assert "got no field 'method', expected one" in second.reason


def test_entries_have_the_fields_of_the_batch_api():
    entry = response_entry("job", 3, "r", [b"image"], created=7)
    assert entry.keys() == {"id", "custom_id", "response", "error"}
    assert entry["response"]["body"] == {"created": 7, "data": [{"b64_json": "aW1hZ2U="}]}
    assert (entry["response"]["status_code"], entry["error"]) == (200, None)
    assert entry["response"]["request_id"].startswith("req_")
    error = error_entry("job", 3, "r", "invalid_request", "no")
    assert error["id"] == entry["id"] != error_entry("job", 4, "r", "", "")["id"]
    assert (error["response"], error["error"]) == (
        None,
        {"code": "invalid_request", "message": "no"},
    )
