"""OpenAI's images API, with its own client."""

import numpy as np
import openai
import pytest
from serving import WAIT, image_of


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
