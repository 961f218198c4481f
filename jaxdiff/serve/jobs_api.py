"""Jobs: images that are asked for now and fetched later, with options by their own names."""

import asyncio
import concurrent.futures
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from jaxdiff.core.errors import InputError
from jaxdiff.generation.tickets import WAITING
from jaxdiff.serve.answering import Body, CarefulRoute, owner_of, priority_of, service_of
from jaxdiff.serve.errors import JSONResponse, RequestError, documented
from jaxdiff.serve.images import OutputFormat, image_from_base64, to_base64
from jaxdiff.serve.job_store import Job, JobState
from jaxdiff.serve.limits import MAX_IMAGES, PRIORITIES, check_loras
from jaxdiff.serve.service import MAX_SEED, Service

IMAGES = ("image", "original_image", "mask")
OWN = {*IMAGES, "prompt", "num_images", "seed", "output_format", "output_compression", "loras"}
router = APIRouter(route_class=CarefulRoute, tags=["jobs"])
_encoder = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="serve-encode")

Text = Annotated[str, Field(max_length=32_000)]
Name = Annotated[str, Field(max_length=8000)]
Base64 = Annotated[str, Field(description="A PNG, JPEG or WebP file in base64.")]


class JobFields(Body):
    """The body of POST /jobs: options of a call, which docs/sampling.md and others describe."""

    prompt: Text
    negative_prompt: Text | None = None
    prompt_2: Text | None = None
    negative_prompt_2: Text | None = None
    prompt_3: Text | None = None
    negative_prompt_3: Text | None = None
    num_images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: float | None = None
    guidance: Name | None = None
    negative_scale: float | None = None
    distilled_guidance_scale: float | None = None
    sampler: Name | None = None
    timestep_spacing: Name | None = None
    eta: float | None = None
    height: Annotated[int, Field(ge=1)] | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    clip_skip: Annotated[int, Field(ge=0)] | None = None
    max_sequence_length: Annotated[int, Field(ge=1)] | None = None
    noise_level: Annotated[int, Field(ge=0)] | None = None
    prompt_syntax: bool | None = None
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    image: Base64 | None = None
    original_image: Base64 | None = None
    mask: Base64 | None = None
    output_format: OutputFormat = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    loras: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=16)] | None = (
        None
    )
    priority: Annotated[int, Field(ge=PRIORITIES[0], le=PRIORITIES[1])] = 0


class JobStatus(BaseModel):
    """How far a job is."""

    id: str
    state: JobState
    progress: float
    queue_position: int | None
    created: int


class JobResultImage(BaseModel):
    """An image of a job, or why there is none."""

    seed: int
    b64_json: str | None
    error: str | None


class JobResult(BaseModel):
    """The images of a job that has ended."""

    id: str
    state: JobState
    output_format: OutputFormat
    images: list[JobResultImage]


@router.post("/jobs", response_model=JobStatus, status_code=202, responses=documented())
async def create_job(request: Request, fields: JobFields) -> Response:
    """Begin a job."""
    service = service_of(request)
    priority, owner = priority_of(request, fields.priority), owner_of(request)
    job = await asyncio.to_thread(_start, service, fields, priority, owner)
    return JSONResponse(_status(service, job), 202)


@router.get("/jobs/{number}", response_model=JobStatus, responses=documented(404))
async def get_job(request: Request, number: str) -> Response:
    """How far a job is."""
    service = service_of(request)
    return JSONResponse(_status(service, service.jobs.get(number, owner_of(request))))


@router.post("/jobs/{number}/cancel", response_model=JobStatus, responses=documented(404))
async def cancel_job(request: Request, number: str) -> Response:
    """Give up the images that are not there; nothing, if the job has ended."""
    service = service_of(request)
    job = service.jobs.get(number, owner_of(request))
    await asyncio.to_thread(job.cancel)
    return JSONResponse(_status(service, job))


@router.get("/jobs/{number}/result", response_model=JobResult, responses=documented(404, 409))
async def get_result(request: Request, number: str) -> Response:
    """The images of a job that has ended; 409 before."""
    service = service_of(request)
    job = service.jobs.get(number, owner_of(request))
    if job.ended is None:
        message = f"job: got one that is {job.state}, expected one that has ended"
        raise RequestError(409, message, code="job_not_done")
    return await asyncio.to_thread(_result, job)


def _start(service: Service, fields: JobFields, priority: int, owner: str) -> Job:
    service.check_open()
    service.jobs.check_room()
    service.limits.check_count(fields.num_images, "num_images")
    check_loras(fields.loras or [], service.lora_folder)
    if fields.output_compression not in (None, 100) and fields.output_format == "png":
        raise InputError("output_compression: got it with output_format png, expected jpeg or webp")
    own: dict[str, Any] = fields.model_dump(exclude={*OWN, "priority"}, exclude_none=True)
    for name in IMAGES:
        if (text := getattr(fields, name)) is not None:
            own[name] = image_from_base64(name, text, service.limits.max_image_pixels)
    image = own.get("image")
    if image is not None and not {"height", "width"} & own.keys():
        own |= service.image_size(image.height, image.width)
    requests = service.resolve(fields.prompt, num_images=fields.num_images, seed=fields.seed, **own)
    generation = service.start(requests, priority=priority, owner=owner)
    job = Job(generation, fields.output_format, fields.output_compression)
    service.jobs.add(job)
    generation.when_done(lambda: _encoder.submit(job.end))
    return job


def _status(service: Service, job: Job) -> dict[str, Any]:
    position = None
    generation, engine = job.generation, service.engine
    if generation is not None and engine is not None and job.state == WAITING:
        positions = [engine.position(ticket) for ticket in generation.tickets]
        position = min((each for each in positions if each is not None), default=None)
    return JobStatus(
        id=job.id,
        state=job.state,
        progress=round(job.progress, 4),
        queue_position=position,
        created=job.created,
    ).model_dump()


def _result(job: Job) -> JSONResponse:
    images = [
        JobResultImage(
            seed=image.seed,
            b64_json=None if image.data is None else to_base64(image.data),
            error=image.error,
        )
        for image in job.images
    ]
    result = JobResult(id=job.id, state=job.state, output_format=job.output_format, images=images)
    return JSONResponse(result.model_dump())
