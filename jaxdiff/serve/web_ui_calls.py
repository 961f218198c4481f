"""Calls of A1111's API: their images, in one pass or two, and how far they are."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import Request as HTTPRequest
from PIL import Image, ImageChops, ImageOps

import jaxdiff
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import NDArray
from jaxdiff.generation.parameters_text import parameters_text
from jaxdiff.generation.tickets import GeneratedImage
from jaxdiff.pipeline import image_inputs
from jaxdiff.pipeline.request import Request
from jaxdiff.serve.answering import finished
from jaxdiff.serve.errors import RequestError
from jaxdiff.serve.images import encode_image, image_from_base64, opaque, to_base64
from jaxdiff.serve.service import Generation, Service
from jaxdiff.serve.web_ui_fields import (
    LATENT_UPSCALER,
    UPSCALERS,
    ImageToImage,
    Progress,
    ProgressState,
    TextToImage,
    WebUIFields,
)

HIRES_STRENGTH = 0.7  # of the second pass
HIRES_SCALE = 2.0


@dataclasses.dataclass(frozen=True)
class SecondPass:
    """The hires fix: enlarge, then change with `strength`."""

    height: int
    width: int
    upscaler: str
    strength: float
    steps: int

    def request(self, first: Request, image: Any) -> Request:
        """That of the second pass for an image or latents of the first, enlarged."""
        return dataclasses.replace(
            first,
            height=self.height,
            width=self.width,
            image=image,
            noise=None,
            strength=self.strength,
            steps=self.steps,
        )

    def enlarged(self, image: NDArray, downscale: int) -> Any:
        """What the first pass gave, at the size of the second."""
        if self.upscaler == LATENT_UPSCALER:
            size = self.height // downscale, self.width // downscale
            return image_inputs.enlarge(image[None], *size)[0]
        nearest = self.upscaler == "Nearest"
        kind = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
        return Image.fromarray(image).resize((self.width, self.height), kind)


class Call:
    """A request of the API that is being answered."""

    def __init__(self, service: Service, fields: WebUIFields, owner: str, priority: int) -> None:
        self.owner, self.interrupted = owner, False
        self.generation: Generation | None = None
        self.preview: NDArray | None = None
        self.job, self._began = fields.force_task_id or "", time.time()
        self._service, self._priority = service, priority
        self._passes_done, self._passes = 0, 1
        self._preview_wanted = False

    def interrupt(self) -> None:
        """Give up the images that are not there; the answer has the others."""
        self.interrupted = True
        if self.generation is not None:
            self.generation.cancel()

    async def run(
        self, request: HTTPRequest, requests: Sequence[Request], second: SecondPass | None
    ) -> list[GeneratedImage]:
        """The images, or fewer if the call is interrupted; raises RequestError and InputError."""
        self._passes = 1 if second is None else 2
        output = "latent" if second is not None and second.upscaler == LATENT_UPSCALER else None
        images = await self._one_pass(request, requests, output)
        if second is None or not images:
            return images
        downscale = self._service.pipe.codec.config.downscale
        enlarged = await asyncio.to_thread(
            lambda: [
                second.request(each.request, second.enlarged(each.image, downscale))
                for each in images
            ]
        )
        self._passes_done = 1
        return await self._one_pass(request, enlarged, None)

    async def _one_pass(
        self, request: HTTPRequest, requests: Sequence[Request], output: str | None
    ) -> list[GeneratedImage]:
        if self.interrupted:
            return []
        generation = await asyncio.to_thread(
            self._service.start,
            requests,
            priority=self._priority,
            owner=self.owner,
            output=output,
        )
        self.generation = generation
        if self.interrupted:
            generation.cancel()
        await finished(request, generation)
        if not self.interrupted:
            return generation.images()
        tickets = generation.tickets
        return [ticket.future.result() for ticket in tickets if ticket.future.exception() is None]

    def progress(self, *, with_image: bool) -> Progress:
        """How far it is; its image as it looks now comes with the next question."""
        generation = self.generation
        tickets = [] if generation is None else generation.tickets
        own = 0.0 if generation is None else generation.progress
        done = (self._passes_done + own) / self._passes
        spent = time.time() - self._began
        going = [ticket for ticket in tickets if not ticket.future.done()]
        step, steps = going[0].progress if going else (0, 0)
        # latents are no image
        if with_image and going and not self._preview_wanted and going[0].output is None:
            self._preview_wanted = True
            going[0].preview(self._show)
        image = None
        if with_image and self.preview is not None:
            image = to_base64(encode_image(self.preview, "png"))
        return Progress(
            progress=round(min(done, 0.99), 4),
            eta_relative=round(spent * (1 - done) / done, 1) if done else 0.0,
            state=ProgressState(
                interrupted=self.interrupted,
                job=self.job,
                job_count=len(tickets),
                job_timestamp=timestamp(self._began),
                job_no=len(tickets) - len(going),
                sampling_step=step,
                sampling_steps=steps,
            ),
            current_image=image,
            textinfo=None,
        )

    def _show(self, pixels: NDArray) -> None:
        self.preview, self._preview_wanted = pixels, False


def timestamp(seconds: float) -> str:
    """A time as the web UI writes it."""
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(seconds))


def requests_of(service: Service, fields: WebUIFields) -> list[Request]:
    """The requests of the fields; raises InputError and RequestError."""
    service.check_open()
    count = fields.batch_size * fields.n_iter
    service.limits.check_count(count, "batch_size * n_iter")
    options = fields.options() | overridden(service, fields.override_settings or {})
    seed = None if fields.seed == -1 else fields.seed
    if isinstance(fields, ImageToImage):
        options |= _images(service, fields, options)
    return service.resolve(fields.prompt, num_images=count, seed=seed, **options)


def _images(service: Service, fields: ImageToImage, options: dict[str, Any]) -> dict[str, Any]:
    """The initial image and the mask, at the size that is asked for; raises InputError."""
    most = service.limits.max_image_pixels
    image = opaque(image_from_base64("init_images", fields.init_images[0], most))
    sides = {name: options[name] for name in ("width", "height") if name in options}
    own: dict[str, Any] = service.image_size(image.height, image.width) | sides
    mask = None
    if fields.mask is not None:
        given = image_from_base64("mask", fields.mask, most)
        # of a mask with transparency the opaque parts count, as in the web UI
        mask = given.convert("L")
        if given.mode == "RGBA" and given.getchannel("A").getextrema() != (255, 255):
            mask = given.getchannel("A")
        if fields.inpainting_mask_invert:
            mask = ImageChops.invert(mask)
    elif fields.inpainting_mask_invert:
        raise InputError("inpainting_mask_invert: got it without a mask, expected both")
    if fields.resize_mode == 1 and own:
        size = own["width"], own["height"]
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        mask = None if mask is None else ImageOps.fit(mask, size, Image.Resampling.LANCZOS)
    return {**own, "image": image, "mask": mask, "strength": fields.denoising_strength}


def overridden(service: Service, settings: dict[str, Any]) -> dict[str, Any]:
    """The options of settings that hold for one request; RequestError for those that cannot."""
    found: dict[str, Any] = {}
    now = current_options(service)
    for name, value in settings.items():
        if name == "CLIP_stop_at_last_layers" and type(value) is int and 1 <= value <= 12:
            if value > 1:
                found["clip_skip"] = value - 1
        elif name not in now:
            raise RequestError(422, f"override_settings: got {name!a:.60}, which is unknown here")
        elif value != now[name] and (name, value) != ("sd_model_checkpoint", service.model_name):
            raise RequestError(
                422, f"{name}: got {value!a:.60}, expected {now[name]!a:.60}, which cannot change"
            )
    return found


def current_options(service: Service) -> dict[str, Any]:
    """The settings of the web UI that have a meaning here."""
    return {
        "sd_model_checkpoint": service.model_name,
        "sd_checkpoint_hash": "",
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "samples_save": False,
        "grid_save": False,
        "return_grid": False,
        "do_not_add_watermark": True,
        "eta_noise_seed_delta": 0,
    }


def second_pass(
    service: Service, fields: TextToImage, requests: Sequence[Request]
) -> SecondPass | None:
    """The second pass of a hires fix; None without one. InputError for what it cannot do."""
    if not fields.enable_hr:
        for name in ("hr_scale", "hr_resize_x", "hr_resize_y", "hr_second_pass_steps"):
            if getattr(fields, name) not in (None, 0, HIRES_SCALE):
                raise InputError(f"{name}: got it without enable_hr, expected both")
        return None
    first, pipe = requests[0], service.pipe
    upscaler = fields.hr_upscaler or LATENT_UPSCALER
    if upscaler not in (LATENT_UPSCALER, *UPSCALERS):
        known = ", ".join((LATENT_UPSCALER, *UPSCALERS))
        raise InputError(f"hr_upscaler: got {upscaler!a:.60}, expected one of {known}")
    scale = HIRES_SCALE if fields.hr_scale is None else fields.hr_scale
    across, down = fields.hr_resize_x or 0, fields.hr_resize_y or 0
    if bool(across) != bool(down):
        raise InputError("hr_resize_x: got one of hr_resize_x and hr_resize_y, expected both")
    size = (down, across) if down else (scale * first.height, scale * first.width)
    multiple = pipe.codec.config.downscale * pipe.family.latent_multiple
    height, width = (max(round(side / multiple), 1) * multiple for side in size)
    strength = fields.denoising_strength
    own = SecondPass(
        height=height,
        width=width,
        upscaler=upscaler,
        strength=HIRES_STRENGTH if strength is None else strength,
        steps=fields.hr_second_pass_steps or first.steps,
    )
    grey = np.zeros((8, 8, 3), np.uint8)
    trial = [own.request(each, grey) for each in requests]
    service.limits.check(trial)
    pipe.check(trial)
    return own


def answer_parts(
    service: Service, fields: WebUIFields, images: Sequence[GeneratedImage]
) -> tuple[list[str], dict[str, Any], str]:
    """The images in base64, the parameters, and the info of an answer."""
    texts = [
        parameters_text({"model": service.model_name, **each.request.to_metadata()})
        for each in images
    ]
    files = [
        to_base64(encode_image(each.image, "png", texts={"parameters": text}))
        for each, text in zip(images, texts, strict=True)
    ]
    parameters = fields.model_dump(exclude={"init_images", "mask"})
    info = _info(service, fields, [each.request for each in images], texts)
    return files if fields.send_images else [], parameters, json.dumps(info)


def _info(
    service: Service, fields: WebUIFields, requests: Sequence[Request], texts: Sequence[str]
) -> dict[str, Any]:
    """What the web UI says of the images of an answer."""
    first = requests[0] if requests else None
    count, seeds = len(requests), [each.seed for each in requests]
    return {
        "prompt": fields.prompt,
        "all_prompts": [fields.prompt] * count,
        "negative_prompt": fields.negative_prompt,
        "all_negative_prompts": [fields.negative_prompt] * count,
        "seed": seeds[0] if seeds else fields.seed,
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * count,
        "subseed_strength": 0,
        "width": first.width if first else fields.width,
        "height": first.height if first else fields.height,
        "sampler_name": fields.sampler_name or (first.sampler if first else None),
        "cfg_scale": first.guidance_scale if first else fields.cfg_scale,
        "steps": first.steps if first else fields.steps,
        "batch_size": fields.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": service.model_name,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first.strength if first else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": list(texts),
        "styles": [],
        "job_timestamp": timestamp(time.time()),
        "clip_skip": (first.clip_skip if first else 0) + 1,
        "is_using_inpainting_conditioning": False,
        "version": f"jaxdiff {jaxdiff.__version__}",
    }
