"""OpenAI's images API: generations, edits, models, and streams of partial images."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.responses import Response, StreamingResponse

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import NDArray
from jaxdiff.pipeline import request as requests_module
from jaxdiff.serve.answering import (
    CarefulRoute,
    finished,
    owner_of,
    parse_fields,
    priority_of,
    service_of,
)
from jaxdiff.serve.errors import JSONResponse, RequestError, documented, error_body, error_of
from jaxdiff.serve.images import (
    decode_image,
    encode_image,
    mask_from_alpha,
    opaque,
    to_base64,
)
from jaxdiff.serve.limits import check_loras
from jaxdiff.serve.openai_fields import (
    EVENTS,
    EditFields,
    GenerationFields,
    ImageData,
    ImageFields,
    ImagesAnswer,
    InputTokens,
    Model,
    Models,
    Usage,
    edit_form,
)
from jaxdiff.serve.service import Generation, Service

LOG = logging.getLogger("jaxdiff.serve")
KEEP_ALIVE_S = 15.0  # between two parts of a stream
MAX_FIELDS = 64  # of a form
IMAGE_FIELDS = ("image", "image[]", "mask")
router = APIRouter(route_class=CarefulRoute, tags=["OpenAI"])


class Asked(NamedTuple):
    """What a request asks for, checked."""

    fields: ImageFields
    requests: list[requests_module.Request]
    usage: Usage
    kind: str  # of events: image_generation or image_edit


@router.get("/v1/models", response_model=Models, responses=documented())
async def list_models(request: Request) -> Models:
    """The model of this server."""
    service = service_of(request)
    return Models(object="list", data=[_model(service)])


@router.get("/v1/models/{name:path}", response_model=Model, responses=documented(404))
async def get_model(request: Request, name: str) -> Model:
    """The model of this server by its name."""
    model = _model(service_of(request))
    if name != model.id:
        message = f"model: got {name!a:.80}, expected {model.id!a}"
        raise RequestError(404, message, param="model", code="model_not_found")
    return model


def _model(service: Service) -> Model:
    return Model(id=service.model_name, object="model", created=service.created, owned_by="jaxdiff")


@router.post(
    "/v1/images/generations",
    response_model=ImagesAnswer,
    responses={200: {"content": EVENTS}, **documented(404, 409)},
)
async def generate(request: Request, fields: GenerationFields) -> Response:
    """Generate images from a prompt."""
    service = service_of(request)
    asked = await asyncio.to_thread(_asked, service, fields, None, None, "image_generation")
    return await _answer(request, asked)


@router.post(
    "/v1/images/edits",
    response_model=ImagesAnswer,
    responses={200: {"content": EVENTS}, **documented(404, 409)},
    openapi_extra={"requestBody": edit_form()},
)
async def edit(request: Request) -> Response:
    """Change an image: where the mask is transparent, or as a whole by `strength`."""
    service = service_of(request)
    service.check_open()
    try:
        form = await request.form(
            max_files=len(IMAGE_FIELDS), max_fields=MAX_FIELDS, max_part_size=2**20
        )
    except MultiPartException as error:
        raise RequestError(400, f"body: got a broken form: {error.message!a:.100}") from None
    try:
        texts, files = await _read(form)
    finally:
        await form.close()
    fields = parse_fields(EditFields, texts, request.url.path)
    asked = await asyncio.to_thread(_asked_edit, service, fields, files)
    return await _answer(request, asked)


async def _read(form: FormData) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The text fields and the files of a form; RequestError for others."""
    texts: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for name, value in form.multi_items():
        if name in IMAGE_FIELDS:
            if not isinstance(value, UploadFile):
                raise RequestError(400, f"{name}: got text, expected a file", param=name)
            own = "mask" if name == "mask" else "image"
            if own in files:
                raise RequestError(400, f"{own}: got several, expected one image", param=own)
            files[own] = await value.read()
        elif isinstance(value, UploadFile):
            raise RequestError(400, f"{name!a:.60}: got a file, expected text")
        elif name in ("loras", "loras[]"):
            texts.setdefault("loras", []).append(value)
        elif name in texts:
            raise RequestError(400, f"{name!a:.60}: got it twice, expected one value")
        else:
            texts[name] = value
    if "image" not in files:
        raise RequestError(400, "image: got none, expected an image to edit", param="image")
    return texts, files


def _asked_edit(service: Service, fields: EditFields, files: dict[str, bytes]) -> Asked:
    most = service.limits.max_image_pixels
    image = decode_image("image", files["image"], most)
    mask = None
    if "mask" in files:
        given = decode_image("mask", files["mask"], most)
        if given.size != image.size:
            sizes = [f"{each.width}x{each.height}" for each in (given, image)]
            raise InputError(f"mask: got {sizes[0]}, expected the size of the image, {sizes[1]}")
        # without any transparency it is a mask as others have it: white is repainted
        mask = mask_from_alpha(given) or given.convert("L")
    else:
        mask = mask_from_alpha(image)
    return _asked(service, fields, opaque(image), mask, "image_edit")


def _asked(
    service: Service,
    fields: ImageFields,
    image: Image.Image | None,
    mask: Image.Image | None,
    kind: str,
) -> Asked:
    """The requests of the fields; raises InputError and RequestError."""
    service.check_open()
    fields.check_effects(service.model_name)
    check_loras(fields.loras or [], service.lora_folder)
    service.limits.check_count(fields.count)
    options = fields.options()
    if image is not None and "width" not in options:
        options |= service.image_size(image.height, image.width)
    requests = service.resolve(
        fields.prompt,
        num_images=fields.count,
        seed=fields.seed,
        image=image,
        mask=mask,
        **options,
    )
    texts = service.count_tokens(fields.prompt) + service.count_tokens(fields.negative_prompt or "")
    size = requests[0].height, requests[0].width
    positions = service.latent_positions(*size)
    given = 0 if image is None else positions
    output = positions * len(requests)
    usage = Usage(
        input_tokens=texts + given,
        output_tokens=output,
        total_tokens=texts + given + output,
        input_tokens_details=InputTokens(text_tokens=texts, image_tokens=given),
    )
    return Asked(fields, requests, usage, kind)


async def _answer(request: Request, asked: Asked) -> Response:
    """The images, as one answer or as a stream of events."""
    service = service_of(request)
    priority = priority_of(request, asked.fields.priority)
    if asked.fields.user is not None:
        LOG.info("%d images for user %r", len(asked.requests), asked.fields.user)
    if asked.fields.stream:
        return await _stream(service, asked, priority, owner_of(request))
    generation = await asyncio.to_thread(
        service.start, asked.requests, priority=priority, owner=owner_of(request)
    )
    await finished(request, generation)
    return await asyncio.to_thread(_whole_answer, generation, asked)


def _whole_answer(generation: Generation, asked: Asked) -> JSONResponse:
    data = [
        ImageData(b64_json=_encoded(each.image, asked.fields), seed=each.request.seed)
        for each in generation.images()
    ]
    answer = ImagesAnswer(
        created=int(time.time()),
        background="opaque",
        output_format=asked.fields.file_format,
        size=_size(asked),
        data=data,
        usage=asked.usage,
    )
    return JSONResponse(answer.model_dump())


def _encoded(pixels: NDArray, fields: ImageFields) -> str:
    return to_base64(encode_image(pixels, fields.file_format, fields.output_compression))


def _size(asked: Asked) -> str:
    return f"{asked.requests[0].width}x{asked.requests[0].height}"


class EventStream(StreamingResponse):
    """Events of a generation, which is cancelled when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], generation: Generation) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._generation = generation

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel("disconnected")  # nothing, where all is done


class _Shown(NamedTuple):
    """Something of an image that a stream has to send: a partial image, or that it is over."""

    number: int  # of the image
    index: int  # of the partial image
    pixels: NDArray | None  # None: the image is over


async def _stream(service: Service, asked: Asked, priority: int, owner: str) -> EventStream:
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[_Shown]()

    def put(shown: _Shown) -> None:
        try:
            loop.call_soon_threadsafe(queue.put_nowait, shown)
        except RuntimeError:  # the loop is closed
            return

    def start() -> Generation:
        generation = service.start(asked.requests, priority=priority, owner=owner)
        for number, ticket in enumerate(generation.tickets):
            for index, step in enumerate(_partial_steps(asked)):
                ticket.preview(
                    lambda pixels, n=number, i=index: put(_Shown(n, i, pixels)), step=step
                )
            ticket.future.add_done_callback(lambda _, n=number: put(_Shown(n, 0, None)))
        return generation

    generation = await asyncio.to_thread(start)
    return EventStream(_events(generation, asked, queue), generation)


def _partial_steps(asked: Asked) -> list[int]:
    """After how many steps each partial image is sent: at equal distances."""
    count, request = asked.fields.partial_images or 0, asked.requests[0]
    strength = 1.0 if request.strength is None else request.strength
    steps = max(int(request.steps * strength), 1)
    return [max(1, steps * (index + 1) // (count + 1)) for index in range(count)]


async def _events(
    generation: Generation, asked: Asked, queue: "asyncio.Queue[_Shown]"
) -> AsyncIterator[bytes]:
    left = len(generation.tickets)
    while left:
        try:
            shown = await asyncio.wait_for(queue.get(), KEEP_ALIVE_S)
        except TimeoutError:
            yield b": keep-alive\n\n"
            continue
        ticket = generation.tickets[shown.number]
        if shown.pixels is None:
            left -= 1
            try:
                image = generation.image_of(ticket)
            except Exception as error:
                generation.cancel()
                yield _event("error", {"type": "error", **error_body(error_of(error))})
                return
            own = {"usage": asked.usage.model_dump()}
            name, pixels = "completed", image.image
        else:
            own, name, pixels = {"partial_image_index": shown.index}, "partial_image", shown.pixels
        seed = {"seed": ticket.request.seed}  # which tells several images apart
        encoded = await asyncio.to_thread(_encoded, pixels, asked.fields)
        kind = f"{asked.kind}.{name}"
        yield _event(kind, {"type": kind, "b64_json": encoded, **_of_event(asked), **own, **seed})


def _of_event(asked: Asked) -> dict[str, Any]:
    return {
        "created_at": int(time.time()),
        "size": _size(asked),
        "quality": "auto",
        "background": "opaque",
        "output_format": asked.fields.file_format,
    }


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode("ascii")
