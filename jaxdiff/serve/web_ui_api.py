"""A1111's web UI API, as plugins such as Krita's use it."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxdiff.generation.parameters_text import SCHEDULE_WORDS
from jaxdiff.serve.answering import CarefulRoute, owner_of, priority_of, service_of
from jaxdiff.serve.errors import JSONResponse, RequestError, documented
from jaxdiff.serve.images import decode_base64, open_image
from jaxdiff.serve.limits import lora_names
from jaxdiff.serve.service import Service
from jaxdiff.serve.web_ui_calls import (
    Call,
    SecondPass,
    answer_parts,
    current_options,
    overridden,
    requests_of,
    second_pass,
)
from jaxdiff.serve.web_ui_fields import (
    SAMPLER_NAMES,
    UPSCALERS,
    Embeddings,
    ImagesAnswer,
    ImageToImage,
    LoRAItem,
    ModelItem,
    PNGInfo,
    PNGInfoFields,
    Progress,
    ProgressState,
    SamplerItem,
    SchedulerItem,
    TextToImage,
    UpscalerItem,
    WebUIFields,
)

MAX_TEXT = 100_000  # characters of a text in a PNG file that are given back
router = APIRouter(
    prefix="/sdapi/v1",
    route_class=CarefulRoute,
    tags=["A1111"],
    responses=documented(web_ui=True),
)
IMAGES: dict[str, Any] = {"response_model": ImagesAnswer}


@router.post("/txt2img", **IMAGES)
async def text_to_image(request: Request, fields: TextToImage) -> Response:
    """Generate images from a prompt."""
    return await _answer(request, fields)


@router.post("/img2img", **IMAGES)
async def image_to_image(request: Request, fields: ImageToImage) -> Response:
    """Change an image, or what a mask shows in white."""
    return await _answer(request, fields)


async def _answer(request: Request, fields: WebUIFields) -> Response:
    service = service_of(request)

    def prepared() -> tuple[list[Any], SecondPass | None]:
        requests = requests_of(service, fields)
        second = None
        if isinstance(fields, TextToImage):
            second = second_pass(service, fields, requests)
        return requests, second

    requests, second = await asyncio.to_thread(prepared)
    call = Call(service, fields, owner_of(request), priority_of(request, 0))
    service.calls.append(call)
    try:
        images = await call.run(request, requests, second)
    finally:
        service.calls.remove(call)

    def answer() -> JSONResponse:
        files, parameters, info = answer_parts(service, fields, images)
        return JSONResponse({"images": files, "parameters": parameters, "info": info})

    return await asyncio.to_thread(answer)


def _calls(request: Request) -> list[Call]:
    """The calls of the client's key."""
    return [call for call in service_of(request).calls if call.owner == owner_of(request)]


@router.get("/progress", response_model=Progress)
async def get_progress(request: Request, skip_current_image: bool = False) -> Progress:
    """How far the oldest request is that this key has made."""
    for call in _calls(request):
        return await asyncio.to_thread(call.progress, with_image=not skip_current_image)
    return Progress(
        progress=0.0, eta_relative=0.0, state=ProgressState(), current_image=None, textinfo=None
    )


@router.post("/interrupt")
async def interrupt(request: Request) -> None:
    """Give up the images of all requests that this key has made; they answer with what is done."""
    for call in _calls(request):
        await asyncio.to_thread(call.interrupt)


@router.get("/options")
async def get_options(request: Request) -> dict[str, Any]:
    """The settings that have a meaning here."""
    return current_options(service_of(request))


@router.post("/options")
async def set_options(request: Request, settings: dict[str, Any]) -> None:
    """Settings as they are; 422 for any change, which would be one for all clients."""
    service = service_of(request)
    if overridden(service, settings):
        message = "CLIP_stop_at_last_layers: got it for all requests, expected override_settings"
        raise RequestError(422, message)


@router.get("/samplers")
async def samplers() -> list[SamplerItem]:
    """The samplers."""
    return [
        SamplerItem(name=word, aliases=[] if word == name else [name], options={})
        for word, name in SAMPLER_NAMES.items()
    ]


@router.get("/schedulers")
async def schedulers() -> list[SchedulerItem]:
    """The spacings of noise levels."""
    return [
        SchedulerItem(
            name=word.lower().replace(" ", "_"),
            label=word,
            aliases=None if name is None else [name],
            default_rho=7.0 if name == "karras" else -1.0,
            need_inner_model=False,
        )
        for name, word in SCHEDULE_WORDS.items()
    ]


@router.get("/upscalers")
async def upscalers() -> list[UpscalerItem]:
    """The ways to enlarge images."""
    return [
        UpscalerItem(name=name, model_name=None, model_path=None, model_url=None, scale=4.0)
        for name in UPSCALERS
    ]


@router.get("/sd-models")
async def models(request: Request) -> list[ModelItem]:
    """The model of this server."""
    name = service_of(request).model_name
    return [
        ModelItem(title=name, model_name=name, hash=None, sha256=None, filename=name, config=None)
    ]


@router.get("/loras")
async def loras(request: Request) -> list[LoRAItem]:
    """The LoRAs of the server's folder."""
    return [
        LoRAItem(name=name, alias=name, path=name, metadata={})
        for name in await asyncio.to_thread(lora_names, service_of(request).lora_folder)
    ]


@router.get("/embeddings")
async def embeddings(request: Request) -> Embeddings:
    """The textual inversions of the model."""
    return Embeddings(loaded=_tokens(service_of(request)), skipped={})


def _tokens(service: Service) -> dict[str, Any]:
    return {token: {} for token in service.pipe.textual_inversion_tokens}


@router.post("/png-info")
async def png_info(request: Request, fields: PNGInfoFields) -> PNGInfo:
    """What a PNG file says of its generation."""
    most = service_of(request).limits.max_image_pixels

    def read() -> PNGInfo:
        image = open_image("image", decode_base64("image", fields.image), most)
        texts = {
            str(key): text[:MAX_TEXT] for key, text in image.info.items() if isinstance(text, str)
        }
        return PNGInfo(info=texts.pop("parameters", ""), items=texts, parameters={})

    return await asyncio.to_thread(read)
