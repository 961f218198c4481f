"""A request as the JSON values that are stored with its image."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

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
    return own | {name: _plain(value) for name, value in request.extras.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return f"sha256 {hashlib.sha256(value.tobytes()).hexdigest()[:12]}"
    return list(value) if isinstance(value, tuple) else value
