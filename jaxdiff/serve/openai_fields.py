"""The fields of OpenAI's images API that clients send and get, with those that servers add."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from jaxdiff.core.errors import InputError
from jaxdiff.serve.answering import Body
from jaxdiff.serve.errors import RequestError
from jaxdiff.serve.images import OutputFormat
from jaxdiff.serve.limits import MAX_IMAGES, PRIORITIES, parse_size
from jaxdiff.serve.service import MAX_SEED

# Fields without an effect here, and the values that ask for nothing else than what happens.
NO_EFFECT: Mapping[str, tuple[str, ...]] = {
    "quality": ("auto",),
    "style": (),
    "background": ("auto", "opaque"),
    "moderation": ("auto",),
    "response_format": ("b64_json",),
    "input_fidelity": (),
}
Word = Annotated[str, Field(max_length=64)]


class ImageFields(Body):
    """What generations and edits have in common."""

    prompt: Annotated[str, Field(min_length=1, description="What the image shows.")]
    model: Annotated[
        Annotated[str, Field(max_length=256)] | None,
        Field(description="The name that /v1/models lists. Default: that one."),
    ] = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    size: Annotated[
        Annotated[str, Field(max_length=16)] | None,
        Field(description="auto, or WIDTHxHEIGHT in pixels."),
    ] = None
    quality: Word | None = None
    background: Word | None = None
    response_format: Word | None = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    negative_prompt: str | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: float | None = None
    true_cfg_scale: Annotated[float | None, Field(description="The same as guidance_scale.")] = None
    seed: Annotated[
        Annotated[int, Field(ge=0, le=MAX_SEED)] | None,
        Field(description="Image j has seed + j. Default: random."),
    ] = None
    sampler: Annotated[str, Field(max_length=200)] | None = None
    guidance: Annotated[str, Field(max_length=200)] | None = None
    loras: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=16)] | None = (
        None
    )
    priority: Annotated[
        int, Field(ge=PRIORITIES[0], le=PRIORITIES[1], description="Lower ones come first.")
    ] = 0

    @property
    def count(self) -> int:
        """How many images are asked for."""
        return 1 if self.n is None else self.n

    @property
    def file_format(self) -> OutputFormat:
        """The format of the images."""
        return self.output_format or "png"

    def check_effects(self, model_name: str) -> None:
        """RequestError for fields without an effect, and for another model."""
        for name, values in NO_EFFECT.items():
            got = getattr(self, name, None)
            if got is not None and got not in values:
                wanted = f"{' or '.join(values)} or " if values else ""
                message = f"{name}: got {got!a}, which has no effect here, expected {wanted}none"
                raise RequestError(400, message, param=name, code="unsupported_value")
        if self.model not in (None, model_name):
            message = f"model: got {self.model!a:.80}, expected {model_name!a}"
            raise RequestError(404, message, param="model", code="model_not_found")
        if self.output_compression not in (None, 100) and self.file_format == "png":
            message = (
                f"output_compression: got {self.output_compression} with output_format png, which "
                "loses nothing, expected jpeg or webp"
            )
            raise RequestError(400, message, param="output_compression")
        if self.partial_images and not self.stream:
            message = f"partial_images: got {self.partial_images} without stream, expected both"
            raise RequestError(400, message, param="partial_images")

    def options(self) -> dict[str, Any]:
        """The options of a call of the pipeline; InputError for two of one thing."""
        scale = self.guidance_scale
        if self.true_cfg_scale is not None:
            if scale is not None:
                raise InputError(
                    "true_cfg_scale: got it and guidance_scale, two names of one thing, expected "
                    "one of them"
                )
            scale = self.true_cfg_scale
        own = {
            "negative_prompt": self.negative_prompt,
            "steps": self.num_inference_steps,
            "guidance_scale": scale,
            "sampler": self.sampler,
            "guidance": self.guidance,
        }
        if self.size not in (None, "auto"):
            own["width"], own["height"] = parse_size("size", str(self.size))
        return {name: value for name, value in own.items() if value is not None}


class GenerationFields(ImageFields):
    """The body of /v1/images/generations."""

    style: Word | None = None
    moderation: Word | None = None


class EditFields(ImageFields):
    """The text fields of /v1/images/edits."""

    input_fidelity: Word | None = None
    strength: Annotated[float, Field(ge=0, le=1)] | None = None

    def options(self) -> dict[str, Any]:
        """The options of a call of the pipeline."""
        own = super().options()
        return own if self.strength is None else own | {"strength": self.strength}


class InputTokens(BaseModel):
    """Tokens of the prompt, and latents of the image that is edited."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens of the prompt by the first text encoder, and the latents of images."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokens


class ImageData(BaseModel):
    """One image."""

    b64_json: str
    seed: int


class ImagesAnswer(BaseModel):
    """The answer to /v1/images/generations and /v1/images/edits."""

    created: int
    background: Literal["opaque"]
    output_format: OutputFormat
    size: str
    data: list[ImageData]
    usage: Usage


class Model(BaseModel):
    """A model of the server."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    """The models of the server, which has one."""

    object: Literal["list"]
    data: list[Model]


_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}
EVENTS = {"text/event-stream": {"schema": _EVENT}}  # what a stream answers, each of it
_PNG = {"type": "string", "contentMediaType": "application/octet-stream"}


def edit_form() -> dict[str, Any]:
    """The multipart form of /v1/images/edits, for the OpenAPI schema."""
    schema = EditFields.model_json_schema()
    properties = {
        "image": _PNG,
        "image[]": {"type": "array", "items": _PNG, "maxItems": 1},
        "mask": _PNG,
        **{name: _plain(value) for name, value in schema["properties"].items()},
    }
    form = {"type": "object", "properties": properties, "required": ["prompt"]}
    return {"required": True, "content": {"multipart/form-data": {"schema": form}}}


def _plain(value: Any) -> Any:
    """A field's schema without null, which no form has."""
    choices = [each for each in value.get("anyOf", []) if each.get("type") != "null"]
    own = {key: each for key, each in value.items() if key not in ("anyOf", "default", "title")}
    return json.loads(json.dumps({**own, **choices[0]} if choices else own))
