"""What the server takes from one client: limits that are checked before any work of the model."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.checkpoints.lora_names import has_weights
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, positive
from jaxdiff.pipeline.request import Request
from jaxdiff.serve.errors import RequestError

MAX_IMAGES = 10  # of one request, as in OpenAI's API
MAX_DEPTH = 32  # of JSON
PRIORITIES = (-10, 10)  # lower ones come first
MIB = 2**20
_LORA_NAME = re.compile(r"[\w][\w .+-]{0,199}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a server."""

    max_pixels: int = 2**21  # of a generated image
    max_steps: int = 150
    max_images: int = MAX_IMAGES  # of a request
    max_prompt_length: int = 4000  # in characters, of each text
    max_upload_bytes: int = 16 * MIB  # of the images of a request
    max_json_bytes: int = MIB  # of a request without images
    max_image_pixels: int = 2**24  # of an uploaded image
    sizes: tuple[str, ...] = ()  # WxH that are served; empty: all

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "sizes":
                positive(name, value)
        in_range("max_images", self.max_images, 1, MAX_IMAGES)
        for size in self.sizes:
            parse_size("sizes", size)

    def check_texts(self, texts: Iterable[str | None]) -> None:
        """InputError for a text that is too long."""
        for text in texts:
            if text is not None and len(text) > self.max_prompt_length:
                raise InputError(
                    f"prompt: got {len(text)} characters, expected at most {self.max_prompt_length}"
                )

    def check_count(self, count: int, name: str = "n") -> None:
        """InputError for more images than a request may have."""
        in_range(name, count, 1, self.max_images)

    def check(self, requests: Sequence[Request]) -> None:
        """InputError for requests that are too large, RuntimeError for one that names a file."""
        for request in requests:
            check_no_files(request)
            pixels = request.height * request.width
            if pixels > self.max_pixels:
                raise InputError(
                    f"size: got {request.width}x{request.height}, which is {pixels} pixels, "
                    f"expected at most {self.max_pixels}"
                )
            size = f"{request.width}x{request.height}"
            if self.sizes and size not in self.sizes:
                raise InputError(f"size: got {size}, expected one of {', '.join(self.sizes)}")
            if request.steps > self.max_steps:
                raise InputError(f"steps: got {request.steps}, expected at most {self.max_steps}")


def check_no_files(request: Request) -> None:
    """RuntimeError for a request that would open a file: images are arrays here, never names."""
    given = (request.image, request.mask, request.noise)
    for value in (*given, request.image_prompt, request.low_resolution, *request.extras.values()):
        if isinstance(value, str | bytes | pathlib.PurePath):
            raise RuntimeError("a request names a file where an image is expected")
    for value in (*given, request.image_prompt, request.low_resolution):
        if value is not None and not isinstance(value, np.ndarray | Image.Image):
            raise RuntimeError(f"a request has a {type(value).__name__} where an image is expected")


def parse_size(name: str, text: str) -> tuple[int, int]:
    """Width and height of "WxH"; InputError for any other text."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, flags=re.ASCII)
    if match is None:
        raise InputError(f"{name}: got {text!a:.40}, expected WIDTHxHEIGHT such as 1024x1024")
    return int(match[1]), int(match[2])


def parse_json(body: bytes) -> Any:
    """The JSON of a body; RequestError for what is none, is nested deeply, or is not finite."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except (ValueError, UnicodeDecodeError):
        message = "body: got what is not JSON, expected a JSON object"
        raise RequestError(400, message, code="invalid_json") from None
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return value
    raise _too_deep()


def _too_deep() -> RequestError:
    message = f"body: got JSON that is nested deeply, expected at most {MAX_DEPTH} levels"
    return RequestError(400, message, code="invalid_json")


def _refuse_constant(text: str) -> Any:
    raise ValueError(text)


def _inside(value: Any) -> list[Any]:
    """The lists and objects in a JSON value."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in values if isinstance(each, dict | list)]


def lora_names(folder: pathlib.Path | None) -> list[str]:
    """The LoRAs of the server's folder by name: files without their ending, and folders."""
    if folder is None:
        return []
    found = {
        path.name if path.is_dir() else path.stem
        for path in folder.iterdir()
        if path.suffix == ".safetensors" or (path.is_dir() and has_weights(path))
    }
    return sorted(name for name in found if _LORA_NAME.fullmatch(name))


def check_loras(names: Sequence[str], folder: pathlib.Path | None) -> None:
    """RequestError for LoRAs, which no request can have of its own yet."""
    if not names:
        return
    known = lora_names(folder)
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none: the server has no LoRAs"
            message = f"loras: got {name!a:.60}, expected one of {listed}"
            raise RequestError(400, message, param="loras", code="lora_not_found")
    raise RequestError(
        400,
        f"loras: got {names[0]!a:.60}, which cannot be applied to a single request yet, expected "
        "none",
        param="loras",
        code="lora_not_supported",
    )
