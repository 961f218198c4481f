"""A request as the JSON values that are stored with its image."""

import dataclasses
import hashlib
import pathlib
from typing import Any

import numpy as np
from PIL import Image

# Options of a request that are left out where they are empty.
NUMBERED = ("prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3")
TEXTS = ("prompt", "negative_prompt", *NUMBERED)
SCALES = ("negative_scale", "classifier_scale", "clip_scale")


def to_metadata(request: Any) -> dict[str, Any]:
    """A request's settings as JSON values; rare options only if set, arrays as their hash."""
    own: dict[str, Any] = {}
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        unset = not value if field.name in (*TEXTS, *SCALES) else value == field.default
        required = field.default is dataclasses.MISSING
        if field.compare and field.name != "extras" and (required or not unset):
            own[field.name] = value
    return own | {name: plain_value(value) for name, value in request.extras.items()}


def plain_value(value: Any) -> Any:
    """An option as a JSON value: images, arrays and files as their hash."""
    if isinstance(value, pathlib.Path):
        return f"{value.name} {_digest(value.read_bytes())}"
    if isinstance(value, Image.Image):
        return _digest(np.asarray(value).tobytes())
    if isinstance(value, np.ndarray):
        return _digest(value.tobytes())
    return [plain_value(each) for each in value] if isinstance(value, list | tuple) else value


def _digest(data: bytes) -> str:
    return f"sha256 {hashlib.sha256(data).hexdigest()[:12]}"
