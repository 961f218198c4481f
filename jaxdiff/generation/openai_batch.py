"""Lines of OpenAI's Batch API: requests of /v1/images/generations, and what answers them.

A request is `{"custom_id", "method": "POST", "url", "body"}`. Its body may also have the fields of
servers of open models: EXTRA.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdiff.core.configs import prefix_errors, typed
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, one_of

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
REQUEST = ("custom_id", "method", "url", "body")
MAX_IMAGES = 10  # of a request
MAX_PROMPT = 32_000  # characters
FORMATS = ("png", "webp", "jpeg")
# Fields of a body that our lines have too, and what ours are called.
EXTRA: Mapping[str, str] = {
    "negative_prompt": "negative_prompt",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance_scale",
    "seed": "seed",
    "sampler": "sampler",
    "guidance": "guidance",
    "loras": "loras",
}
WITHOUT_EFFECT = ("quality", "style", "background", "moderation")  # but for "auto"
BODY = (
    *("prompt", "n", "size", "model", "user", "output_format", "output_compression"),
    *("response_format", *WITHOUT_EFFECT, *EXTRA),
)


class BatchRequest(NamedTuple):
    """A request: the values of a line of ours, and what only these requests have."""

    custom_id: str
    values: Mapping[str, Any]
    model: str | None = None  # what it asks for; whoever loads models compares
    image_format: str | None = None  # None: the job's
    quality: int | None = None  # of WebP and JPEG, 0 to 100


def is_batch_request(values: Mapping[str, Any]) -> bool:
    """Whether the object of a line is such a request, perhaps one that lacks something."""
    return "custom_id" in values or {"url", "body"} <= values.keys()


def custom_id_of(values: Mapping[str, Any]) -> str | None:
    """The name of a request that may be a bad one."""
    name = values.get("custom_id")
    return name if isinstance(name, str) else None


def parse_request(values: Mapping[str, Any], source: str) -> BatchRequest:
    """The request in the object of a line; an InputError begins with `source`."""
    for name in values:
        one_of(f"{source}: field", name, REQUEST)
    for name in REQUEST:
        if name not in values:
            raise InputError(f"{source}: got no field {name!r}, expected one")
    with prefix_errors(source):
        custom_id = typed("custom_id", values["custom_id"], str)
        one_of("method", values["method"], ("POST",))
        if values["url"] == EDITS:
            raise InputError(f"url: got {EDITS}, expected {GENERATIONS}: edits are not supported")
        one_of("url", values["url"], (GENERATIONS,))
        if not isinstance(values["body"], dict):
            raise InputError(f"body: got {values['body']!r:.80}, expected an object")
        with prefix_errors("body"):
            return _parse_body(custom_id, values["body"])


def _parse_body(custom_id: str, body: Mapping[str, Any]) -> BatchRequest:
    for name in body:
        one_of("field", name, BODY)
    given = {name: value for name, value in body.items() if value is not None}
    if "prompt" not in given:
        raise InputError("got no field 'prompt', expected one")
    prompt = typed("prompt", given["prompt"], str)
    if len(prompt) > MAX_PROMPT:
        raise InputError(f"prompt: got {len(prompt)} characters, expected at most {MAX_PROMPT}")
    for name in WITHOUT_EFFECT:
        if given.get(name, "auto") != "auto":
            raise InputError(f"{name}: got {given[name]!r:.80}, which has no effect here")
    if given.get("response_format", "b64_json") != "b64_json":
        raise InputError(
            f"response_format: got {given['response_format']!r:.80}, expected 'b64_json'"
        )
    values = {EXTRA[name]: value for name, value in given.items() if name in EXTRA}
    number = in_range("n", typed("n", given.get("n", 1), int), 1, MAX_IMAGES)
    image_format = given.get("output_format")
    quality = given.get("output_compression")
    if image_format is not None:
        one_of("output_format", image_format, FORMATS)
    if quality is not None:
        in_range("output_compression", typed("output_compression", quality, int), 0, 100)
        if quality != 100 and image_format not in ("webp", "jpeg"):  # 100 is OpenAI's default
            raise InputError(
                f"output_compression: got {quality} with output_format {image_format or 'png'}, "
                "expected output_format webp or jpeg"
            )
    if "user" in given:
        typed("user", given["user"], str)
    return BatchRequest(
        custom_id=custom_id,
        values={"prompt": prompt, "num_images": number, **_size(given), **values},
        model=None if "model" not in given else typed("model", given["model"], str),
        image_format=image_format,
        quality=quality,
    )


def _size(body: Mapping[str, Any]) -> dict[str, int]:
    """Width and height of a request, none of "auto"."""
    size = typed("size", body.get("size", "auto"), str)
    if size == "auto":
        return {}
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
    if found is None:
        raise InputError(f"size: got {size!r:.80}, expected 'auto' or WIDTHxHEIGHT in pixels")
    return {"width": int(found[1]), "height": int(found[2])}


def response_entry(
    job: str, index: int, custom_id: str, images: Sequence[bytes], *, created: int
) -> dict[str, Any]:
    """The line of the output file for a request: its images as base64.

    `job` and `index`, the position of the line, make the ids: the same at each try.
    """
    data = [{"b64_json": base64.b64encode(image).decode()} for image in images]
    body = {"created": created, "data": data}
    return {
        "id": f"batch_req_{_digest(job, index)}",
        "custom_id": custom_id,
        "response": {
            "status_code": 200,
            "request_id": f"req_{_digest(job, index, 'response')}",
            "body": body,
        },
        "error": None,
    }


def error_entry(
    job: str, index: int, custom_id: str | None, code: str, message: str
) -> dict[str, Any]:
    """The line of the error file for a request without images."""
    return {
        "id": f"batch_req_{_digest(job, index)}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
