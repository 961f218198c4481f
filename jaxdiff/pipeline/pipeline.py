"""`Pipeline`: a model in memory that turns prompts into pictures."""

import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxdiff.checkpoints.pipelines import PipelineComponents, write_pipeline
from jaxdiff.checkpoints.textual_inversion import read_inversion
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import parameter_count
from jaxdiff.core.types import Float, NDArray, UInt8
from jaxdiff.core.validate import in_range, one_of, positive
from jaxdiff.diffusion.predictions import PREDICTION_TYPES
from jaxdiff.diffusion.schedules import NoiseSchedule
from jaxdiff.diffusion.timesteps import SchedulerOptions, TimestepGrid
from jaxdiff.guidance.nfe import nfe, phase_switches
from jaxdiff.models.build import param_dict
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.pipeline import image_inputs
from jaxdiff.pipeline.auxiliary_models import AuxiliaryModels
from jaxdiff.pipeline.batches import BatchRunner, SamplingPlan, StageTimer
from jaxdiff.pipeline.compiled_model import CompiledModel, ProgressCallback
from jaxdiff.pipeline.conditioning import TextConditioner
from jaxdiff.pipeline.inputs import BatchInputs, InitImage, Noise, make_batches
from jaxdiff.pipeline.intermediates import Intermediates
from jaxdiff.pipeline.lora import LoRAManager
from jaxdiff.pipeline.notebook import images_html, notebook_progress
from jaxdiff.pipeline.parts import ENCODERS, check_channels, check_parts
from jaxdiff.pipeline.prompt_encoding import PromptTokenizer, guidance_rule, tokenize_request
from jaxdiff.pipeline.request import Defaults, Options, Request, resolve, size_of
from jaxdiff.pipeline.vocabulary import TextualInversionTokenizer, add_inversion
from jaxdiff.samplers.registry import make_grid, nfe_per_step

OUTPUTS = ("pil", "numpy", "latent")
MAX_UNTILED = 2048 * 2048  # pixels that the VAE takes as a whole
TILE = 1024  # pixels along a tile of larger pictures
STRENGTH = 0.8  # of a given picture, as in diffusers; all of it where a mask is given too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The pictures in the asked form, the request that made them, and where the seconds went."""

    images: Any  # list of PIL images, uint8 (b, H, W, 3), or scaled float32 latents (b, h, w, c)
    request: Request
    timings: dict[str, float]  # compile_s, encode_s, sample_s, decode_s, total_s
    watched: Intermediates  # the latents of the steps that were to be watched

    def __repr__(self) -> str:
        total, request = self.timings["total_s"], self.request
        size = f"{request.height}x{request.width}"
        return f"Output({len(self.images)} images of {size} in {total:.1f} s)"

    def _repr_html_(self) -> str | None:
        """The images, for notebooks; latents have none."""
        images = list(self.images)
        if images and isinstance(images[0], np.ndarray):
            if images[0].dtype != np.uint8:
                return None
            images = [Image.fromarray(image) for image in images]
        return images_html(images, self.request.prompts)


class Pipeline:
    """A text-to-image model; `jaxdiff.load` makes one.

    `unet`, `vae` and `text_encoders` are modules that can be called by themselves, `text_encoder`
    the first of them; calling the pipeline runs them compiled on all of its devices.
    """

    def __init__(
        self,
        parts: PipelineComponents,
        *,
        name: str,
        devices: Sequence[jax.Device],
        folder: pathlib.Path | None = None,
    ) -> None:
        check_parts(parts, name)
        self.parts = parts
        self.name = name
        self.devices = tuple(devices)
        self.unet = cast(UNet2DConditionModel, parts.components["unet"].module)
        self.vae = cast(AutoencoderKL, parts.components["vae"].module)
        check_channels(self.unet, self.vae, name)
        names = [encoder for encoder in ENCODERS if encoder in parts.components]
        self.text_encoders = [cast(CLIPTextModel, parts.components[n].module) for n in names]
        self._vocabularies = {
            name: TextualInversionTokenizer(parts.tokenizers[ENCODERS[name]], encoder)
            for name, encoder in zip(names, self.text_encoders, strict=True)
        }
        self.text_conditioner = TextConditioner.of(
            self.unet.config,
            self.text_encoders,
            zero_uncond=bool(parts.options.get("force_zeros_for_empty_prompt", True)),
        )
        self.schedule = NoiseSchedule.from_config(parts.scheduler)
        self.scheduler_options = SchedulerOptions.from_config(parts.scheduler)
        self.prediction_type = one_of(
            "scheduler_config.json: prediction_type",
            parts.scheduler.get("prediction_type", "epsilon"),
            PREDICTION_TYPES,
        )
        native = size_of(self.unet.config.sample_size, self.vae.config.downscale)
        taught = {"guidance": "none"} if self.has_guidance_embedding else {}
        self.defaults = Defaults.of(
            taught | dict(parts.defaults), parts.scheduler, native, source=name
        )
        self.stages = CompiledModel(
            self.text_encoders,
            self.unet,
            self.vae,
            prediction_type=self.prediction_type,
            pooled=self.text_conditioner.num_time_ids is not None,
            devices=self.devices,
        )

        self._batches = BatchRunner(
            self.stages,
            cell=self.vae.config.downscale,
            channels=self.vae.config.latent_channels,
            is_inpainting=self.is_inpainting,
            has_guidance_embedding=self.has_guidance_embedding,
            devices=len(self.devices),
        )
        encoders = dict(zip(names, self.text_encoders, strict=True))
        self._adapters = LoRAManager({"unet": self.unet, **encoders})
        self._reader = PromptTokenizer(
            self.text_conditioner,
            list(self._vocabularies.values()),
            closed=self.defaults.closed_vocabulary,
        )
        self._auxiliary = AuxiliaryModels(folder)

    def __repr__(self) -> str:
        networks = []
        for name, component in self.parts.components.items():
            millions = parameter_count(param_dict(component.module)) / 1e6
            networks.append(f"{name}: {type(component.module).__name__} ({millions:.1f} M)")
        dtype = jnp.dtype(self.unet.dtype).name
        return f"Pipeline({self.name!r}, {dtype}, {self.device_name}, {', '.join(networks)})"

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The first text encoder."""
        return self.text_encoders[0]

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's tokenizer."""
        return next(iter(self._vocabularies.values())).tokenizer

    @property
    def is_inpainting(self) -> bool:
        """Whether the network is told a mask and what is around it, as inpainting models are."""
        return self.unet.config.in_channels == 2 * self.vae.config.latent_channels + 1

    @property
    def has_guidance_embedding(self) -> bool:
        """Whether the network was taught guidance, and is told the scale."""
        return self.unet.config.time_cond_proj_dim is not None

    @property
    def device_name(self) -> str:
        """The devices in words, such as "4 x TPU v5 lite"."""
        return f"{len(self.devices)} x {self.devices[0].device_kind}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short text that another training, or another dtype, of the same networks changes."""
        # Every training moves the last layer of the UNet; to read all of them would take long.
        last = np.asarray(self.unet.conv_out.kernel[...])
        return hashlib.sha256(last.tobytes()).hexdigest()[:12]

    def resolve(
        self,
        prompt: str | Sequence[str],
        *,
        image: image_inputs.ImageInput = None,
        mask: image_inputs.ImageInput = None,
        **options: Unpack[Options],
    ) -> Request:
        """The complete request that a call with these arguments would run; raises InputError."""
        if image is None:
            for name in ("strength", "denoising_start"):
                got = options.get(name)
                if got is not None:
                    raise InputError(f"{name}: got {got} without an image, expected both")
            if mask is not None:
                raise InputError("mask: got one without an image, expected both")
        else:
            options = self._of_image(image, mask, options)
        cell = self.vae.config.downscale
        request = resolve(
            self.defaults,
            prompt,
            images=image_inputs.count_of(image),
            pixels_per_cell=cell,
            **options,
        )
        self.text_conditioner.check(request)
        if self.has_guidance_embedding and request.guidance != "none":
            raise InputError(
                f"guidance: got {request.guidance}, expected none: the model was taught guidance"
            )
        if image is not None or request.denoising_end is not None:
            self._steps(request)  # where none is left, now and not when it is drawn
        return request

    def _of_image(
        self, image: image_inputs.ImageInput, mask: image_inputs.ImageInput, options: Options
    ) -> Options:
        """`options` with size and strength where a picture or latents are given without."""
        cell = self.vae.config.downscale
        if image_inputs.are_latents(image, self.vae.config.latent_channels):
            height, width = (cell * length for length in np.shape(image)[-3:-1])
        else:
            height, width = image_inputs.picture_size(image) or (None, None)
        left_out: Options = {"height": height, "width": width}
        if options.get("denoising_start") is None:
            left_out["strength"] = STRENGTH if mask is None else 1.0
        said = {name: value for name, value in options.items() if value is not None}
        return cast(Options, {**left_out, **said})

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: image_inputs.ImageInput = None,
        mask: image_inputs.ImageInput = None,
        latents: Noise | None = None,
        vae_tile: int | None = None,
        batch_size: int | None = None,
        output: str = "pil",
        report: ProgressCallback | None = None,
        watch: Sequence[int] = (),
        **options: Unpack[Options],
    ) -> Output:
        """Draw one picture per prompt, or per seed, scale or image where there is a single prompt.

        `options` are those of `request.Options`; what is None takes the model's default.
        `image` is where to begin: pictures (PIL or uint8), of which `strength` is redrawn (0 to 1),
        or scaled latents; where `mask` is black it stays as it is. `denoising_start` and
        `denoising_end` run a part of the way only, 0 to 1, so that another model can go on with the
        latents. `latents` is unit-variance noise and replaces the seed's. The VAE reads and makes
        pictures beyond MAX_UNTILED pixels in tiles of `vae_tile` pixels, and smaller ones where it
        is given. `batch_size` is how many pictures are drawn at once (all by default); a smaller
        last batch is padded to it. `report(done, steps)` hears of the loop's progress. The latents
        of the steps to `watch`, counted from 0, are in `Output.watched`. Raises InputError.
        """
        one_of("output", output, OUTPUTS)
        request = self.resolve(prompt, image=image, mask=mask, **options)
        if self._auxiliary.load_missing(request):
            self._update_auxiliary()
        origin = InitImage(image, mask, latents)
        tile = self._tile((request.height, request.width), vae_tile)
        count = len(request.prompts)
        size = count if batch_size is None else positive("batch_size", batch_size)
        clock = StageTimer(self.stages)
        drawn: dict[int, tuple[NDArray, NDArray]] = {}
        with notebook_progress(report) as callback:
            plan = self._plan(request, origin, output != "latent", tile, callback, watch)
            for numbers, inputs in self._inputs(plan, origin, size):
                batch = self._batches.run(inputs, plan, size, clock)
                drawn |= dict(zip(numbers, zip(*batch, strict=True), strict=True))
        ordered, watched = (np.stack([drawn[i][k] for i in range(count)]) for k in (0, 1))
        return Output(
            images=[Image.fromarray(image) for image in ordered] if output == "pil" else ordered,
            request=request,
            timings=clock.timings(),
            watched=Intermediates.of(plan.watch, plan.grid, watched),
        )

    def decode_latents(
        self, latents: Float[NDArray, "b h w c"], *, vae_tile: int | None = None
    ) -> UInt8[NDArray, "b h2 w2 3"]:
        """Pictures of scaled latents, such as those that were watched; raises InputError."""
        cell = self.vae.config.downscale
        size = cell * latents.shape[1], cell * latents.shape[2]
        return self._batches.decode_latents(latents, self._tile(size, vae_tile))

    def nfe(self, request: Request) -> int:
        """How often the network is asked about each image of a request; see `guidance.nfe`."""
        grid, (first, last) = self._steps(request)
        lands = last == int(grid.num_steps)
        rule = guidance_rule(request)
        anew = phase_switches(rule, grid, first, last)
        asked = nfe_per_step(request.sampler, last - first, ends_clean=lands, restarts=anew)
        return nfe(rule, grid, first, asked)

    @property
    def loras(self) -> dict[str, float]:
        """The LoRAs that are applied, and how strongly."""
        return dict(self._adapters.scales)

    def load_lora(
        self, source: str | pathlib.Path, scale: float = 1.0, *, name: str | None = None
    ) -> str:
        """Apply the LoRA in a file or folder beside those that are there; returns its name.

        Compiles nothing. `name` is the file's by default. Raises InputError, with the model as it
        was, for factors that fit nothing in it.
        """
        name = self._adapters.load(pathlib.Path(source), name, scale)
        self._weights_changed()
        return name

    def set_loras(self, scales: Mapping[str, float]) -> None:
        """Apply loaded LoRAs with other scales; those that are left out rest."""
        self._adapters.set(scales)
        self._weights_changed()

    def unload_loras(self) -> None:
        """Take all LoRAs off; every weight is again what it was, bit for bit."""
        self._adapters.remove()
        self._weights_changed()

    @property
    def textual_inversion_tokens(self) -> tuple[str, ...]:
        """The words of textual inversions."""
        return next(iter(self._vocabularies.values())).added_tokens

    def load_textual_inversion(self, source: str | pathlib.Path, *, word: str | None = None) -> str:
        """Learn the word in a textual inversion file; returns it, to be used in prompts.

        `word` replaces the file's own. The sampler is not compiled again. Raises InputError, with
        the model as it was, for vectors that do not fit and for words that are known.
        """
        widths = {
            name: encoder.config.hidden_size
            for name, encoder in zip(self._vocabularies, self.text_encoders, strict=True)
        }
        inversion = read_inversion(pathlib.Path(source), widths, word)
        add_inversion(self._vocabularies, inversion)
        self._weights_changed()
        return inversion.word

    def unload_textual_inversions(self) -> None:
        """Forget all words of textual inversions."""
        for vocabulary in self._vocabularies.values():
            vocabulary.reset()
        self._weights_changed()

    def load_classifier(self, folder: str | pathlib.Path) -> None:
        """Take the classifier of noisy latents in `folder` for `classifier_scale`."""
        self._auxiliary.load_classifier(pathlib.Path(folder))
        self._update_auxiliary()

    def load_clip(self, folder: str | pathlib.Path) -> None:
        """Take the CLIP model in `folder` for `clip_scale`."""
        self._auxiliary.load_clip(pathlib.Path(folder))
        self._update_auxiliary()

    def set_guide(self, guide: "Pipeline | None") -> None:
        """Take another model of the same latents and noise schedule as autoguidance's weaker one.

        InputError for others.
        """
        self._auxiliary.set_guidance_model(guide, self.vae.config.latent_channels, self.schedule)
        self._update_auxiliary()

    def _update_auxiliary(self) -> None:
        auxiliary = self._auxiliary
        self.stages.set_auxiliary_models(
            guidance_model=None
            if auxiliary.guidance_model is None
            else auxiliary.guidance_model.stages,
            classifier=auxiliary.classifier,
            clip=auxiliary.clip,
            image_processor=auxiliary.image_processor,
        )

    def _weights_changed(self) -> None:
        self.stages.set_weights(self.text_encoders, self.unet)

    def save(self, folder: str | pathlib.Path) -> None:
        """Write a diffusers folder that PyTorch loads; weights keep their dtype.

        LoRAs that are applied are in the weights. InputError where textual inversions are loaded,
        which have no place in such a folder.
        """
        if self.textual_inversion_tokens:
            words = ", ".join(self.textual_inversion_tokens)
            raise InputError(f"save: got the added words {words}, expected none")
        write_pipeline(folder, self.parts)

    def _tile(self, size: tuple[int, int], tile: int | None) -> int | None:
        """The length of the VAE's tiles in pixels; None where it takes the picture as a whole."""
        cell = self.vae.config.downscale
        if tile is None:
            return TILE // cell * cell if math.prod(size) > MAX_UNTILED else None
        if tile < 2 * cell or tile % cell:
            raise InputError(f"vae_tile: got {tile}, expected a multiple of {cell} above it")
        return tile

    def _plan(
        self,
        request: Request,
        origin: InitImage,
        decode: bool,
        tile: int | None,
        report: ProgressCallback | None,
        watch: Sequence[int],
    ) -> SamplingPlan:
        grid, span = self._steps(request)
        for step in watch:
            in_range("watch", step, span[0], span[1] - 1)
        if request.denoising_start is not None:
            start = "latents"
        elif origin.image is None or (origin.mask is not None and request.strength == 1):
            start = "noise"
        else:
            start = "image"
        return SamplingPlan(
            request=request,
            grid=grid,
            step_range=span,
            rule=guidance_rule(request),
            guidance_model=None
            if self._auxiliary.guidance_model is None
            else self._auxiliary.guidance_model.stages,
            start=start,
            decode=decode,
            tile=tile,
            report=report,
            watch=tuple(sorted(set(watch))),
        )

    def _steps(self, request: Request) -> tuple[TimestepGrid, tuple[int, int]]:
        """The grid of a request, and which of its steps are run."""
        grid = make_grid(
            self.schedule,
            request.sampler,
            request.steps,
            prediction_type=self.prediction_type,
            spacing=request.timesteps,
            options=self.scheduler_options,
        )
        times = np.asarray(grid.t)[: int(grid.num_steps)]
        return grid, request.step_range(times, self.schedule.num_timesteps)

    def _inputs(
        self, plan: SamplingPlan, origin: InitImage, size: int
    ) -> Iterator[tuple[list[int], BatchInputs]]:
        """The images' inputs in batches; a warning where words find no room."""
        request, guide = plan.request, self._auxiliary.guidance_model
        asked = tokenize_request(
            request,
            plan.rule,
            self._reader,
            None if guide is None else guide._reader,
            self._auxiliary.guidance_targets(request, self.tokenizer),
        )
        yield from make_batches(request, origin, asked, self._batches.latent_shape(request), size)
