"""`Pipeline`: a loaded model that generates images from prompts."""

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
from jaxdiff.checkpoints.schedulers import (
    MAX_CONTINUOUS_STEPS,
    SchedulerOptions,
    make_grid,
    prediction_type_of,
    schedule_of,
)
from jaxdiff.checkpoints.textual_inversion import read_inversion
from jaxdiff.core.aliases import rename_arguments
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import parameter_count
from jaxdiff.core.types import Float, NDArray, UInt8
from jaxdiff.core.validate import in_range, one_of, positive
from jaxdiff.diffusion.timesteps import TimestepGrid
from jaxdiff.families.registry import accepted_options, family_of, request_options
from jaxdiff.guidance.nfe import nfe, phase_switches
from jaxdiff.models.build import param_dict
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.pipeline import image_inputs
from jaxdiff.pipeline.auxiliary_models import AuxiliaryModels, GuidanceModel
from jaxdiff.pipeline.batches import BatchRunner, SamplingPlan, StageTimer
from jaxdiff.pipeline.compiled_model import CompiledModel, ProgressCallback, StartLevel
from jaxdiff.pipeline.conditioning import check_request
from jaxdiff.pipeline.diffusers_arguments import accept_diffusers_arguments
from jaxdiff.pipeline.inputs import BatchInputs, InitImage, Noise, make_batches
from jaxdiff.pipeline.intermediates import Intermediates
from jaxdiff.pipeline.lora import LoRAManager
from jaxdiff.pipeline.notebook import images_html, notebook_progress
from jaxdiff.pipeline.prompt_encoding import PromptTokenizer, guidance_rule, tokenize_requests
from jaxdiff.pipeline.request import Defaults, Options, Requests, resolve, size_of
from jaxdiff.pipeline.vocabulary import TextualInversionTokenizer, add_inversion
from jaxdiff.samplers.registry import get_sampler

OUTPUTS = ("pil", "numpy", "latent")
MAX_UNTILED = 2048 * 2048  # pixels that the VAE processes without tiles
TILE = 1024  # side of the tiles of larger images, in pixels
STRENGTH = 0.8  # default for an initial image, as in diffusers; 1 with a mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The images in the requested form, their complete requests, and timings."""

    images: Any  # list of PIL images, uint8 (b, H, W, 3), or scaled float32 latents (b, h, w, c)
    requests: Requests  # one for each image
    timings: dict[str, float]  # compile_s, encode_s, sample_s, decode_s, total_s
    intermediates: Intermediates  # the latents at `intermediate_steps`

    @property
    def watched(self) -> Intermediates:
        """The former name of `intermediates`."""
        return self.intermediates

    @property
    def request(self) -> Requests:
        """The requests, read by columns: `out.request.seeds`, `out.request.steps`."""
        return self.requests

    def __repr__(self) -> str:
        total, request = self.timings["total_s"], self.requests[0]
        size = f"{request.height}x{request.width}"
        return f"Output({len(self.images)} images of {size} in {total:.1f} s)"

    def _repr_html_(self) -> str | None:
        """The images, for notebooks; latents have none."""
        images = list(self.images)
        if images and isinstance(images[0], np.ndarray):
            if images[0].dtype != np.uint8:
                return None
            images = [Image.fromarray(image) for image in images]
        return images_html(images, self.requests.prompts)


class Pipeline:
    """A text-to-image model; `jaxdiff.load` makes one.

    `network`, which also has the name of its component (`unet`), `vae` and `text_encoders` are
    modules that you can call; `text_encoder` is the first text encoder. Calling the pipeline runs
    them compiled on all of its devices.
    """

    def __init__(
        self,
        parts: PipelineComponents,
        *,
        name: str,
        devices: Sequence[jax.Device],
        folder: pathlib.Path | None = None,
    ) -> None:
        self.family = family_of(parts, name)
        self.parts = parts
        self.name = name
        self.devices = tuple(devices)
        self.network: Any = parts.components[self.family.network].module
        self.vae = cast(AutoencoderKL, parts.components[self.family.latent_codec].module)
        encoders = {
            spec: cast(CLIPTextModel, parts.components[spec.component].module)
            for spec in self.family.text_encoders
        }
        self.text_encoders = list(encoders.values())
        self._vocabularies = {
            spec.component: TextualInversionTokenizer(parts.tokenizers[spec.tokenizer], encoder)
            for spec, encoder in encoders.items()
        }
        self.schedule = schedule_of(parts.scheduler)
        self.scheduler_options = SchedulerOptions.from_config(parts.scheduler)
        self.prediction_type = prediction_type_of(parts.scheduler)
        native = size_of(self.network.config.sample_size, self.vae.config.downscale)
        self.defaults = Defaults.of(
            self.family.defaults | dict(parts.defaults), parts.scheduler, native, source=name
        )
        self.stages = CompiledModel(
            self.family,
            self.text_encoders,
            self.network,
            self.vae,
            prediction_type=self.prediction_type,
            devices=self.devices,
        )

        self._runner = BatchRunner(
            self.stages,
            vae_scale_factor=self.vae.config.downscale,
            channels=self.vae.config.latent_channels,
            uses_mask=self.family.uses_mask,
            devices=len(self.devices),
        )
        adapted = dict(zip(self._vocabularies, self.text_encoders, strict=True))
        self._loras = LoRAManager({self.family.network: self.network, **adapted})
        self._prompt_tokenizer = PromptTokenizer(
            self.family,
            list(self._vocabularies.values()),
            closed=self.defaults.closed_vocabulary,
        )
        self._auxiliary = AuxiliaryModels(folder)

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> "Pipeline":
        """Not here: raises InputError with the call that loads a model."""
        del args, kwargs
        raise InputError(
            "from_pretrained: got a name of diffusers, expected jaxdiff.load(path_or_repository, "
            'dtype="bfloat16")'
        )

    def __repr__(self) -> str:
        networks = []
        for name, component in self.parts.components.items():
            millions = parameter_count(param_dict(component.module)) / 1e6
            networks.append(f"{name}: {type(component.module).__name__} ({millions:.1f} M)")
        dtype = jnp.dtype(self.network.dtype).name
        return f"Pipeline({self.name!r}, {dtype}, {self.device_name}, {', '.join(networks)})"

    def __getattr__(self, name: str) -> Any:
        # The network under the name of its component: pipe.unet, pipe.transformer.
        if name != "family" and name == self.family.network:
            return self.network
        raise AttributeError(f"'Pipeline' object has no attribute {name!r}")

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
        """Whether the network takes a mask and a masked image, as inpainting models do."""
        return self.family.uses_mask

    @property
    def device_name(self) -> str:
        """Number and kind of the devices, such as "4 x TPU v5 lite"."""
        return f"{len(self.devices)} x {self.devices[0].device_kind}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash that changes with the weights and their dtype."""
        # Every training changes the last layer; hashing all layers would take long.
        last = np.asarray(param_dict(self.network)[self.family.adapter.output_layer])
        return hashlib.sha256(last.tobytes()).hexdigest()[:12]

    @accept_diffusers_arguments
    @rename_arguments
    def resolve(
        self,
        prompt: str | Sequence[str],
        *,
        image: image_inputs.ImageInput = None,
        mask: image_inputs.ImageInput = None,
        **options: Unpack[Options],
    ) -> Requests:
        """The complete requests that a call with these arguments would run; raises InputError."""
        if image is None:
            for name in ("strength", "denoising_start"):
                values = options.get(name)
                for value in values if isinstance(values, Sequence) else (values,):
                    if value is not None:
                        raise InputError(
                            f"{name}: got {value} without an image, expected an image too"
                        )
            if mask is not None:
                raise InputError("mask: got a mask without an image, expected an image too")
        else:
            options = self._with_image_defaults(image, mask, options)
        known = request_options()
        requests = resolve(
            self.defaults,
            prompt,
            images=image_inputs.count_of(image),
            vae_scale_factor=self.vae.config.downscale,
            extras=accepted_options(self.family, options),
            **cast(Options, {k: value for k, value in options.items() if k not in known}),
        )
        for request in requests:
            check_request(self.family, request)
        if image is not None or options.get("denoising_end") is not None:
            self._grid(requests)  # raises where no step is left
        return requests

    def _with_image_defaults(
        self, image: image_inputs.ImageInput, mask: image_inputs.ImageInput, options: Options
    ) -> Options:
        """`options` with defaults for size and strength that depend on the initial image."""
        cell = self.vae.config.downscale
        if image_inputs.are_latents(image, self.vae.config.latent_channels):
            height, width = (cell * length for length in np.shape(image)[-3:-1])
        else:
            height, width = image_inputs.image_size(image) or (None, None)
        defaults: Options = {"height": height, "width": width}
        if options.get("denoising_start") is None:
            strength, chosen = STRENGTH if mask is None else 1.0, options.get("strength")
            defaults["strength"] = strength
            if isinstance(chosen, Sequence):
                filled = [strength if value is None else value for value in chosen]
                options = cast(Options, {**options, "strength": filled})
        given = {name: value for name, value in options.items() if value is not None}
        return cast(Options, {**defaults, **given})

    @accept_diffusers_arguments
    @rename_arguments
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
        callback: ProgressCallback | None = None,
        intermediate_steps: Sequence[int] = (),
        **options: Unpack[Options],
    ) -> Output:
        """Generate one image per prompt; a single prompt serves several seeds, scales or images.

        `options` are those of `request.Options`; None takes the model's default.

        image, mask: initial images (PIL or uint8), changed by `strength`, or scaled latents. The
            mask is white where the image is repainted and black where it is kept.
        latents: unit-variance noise instead of that of the seeds.
        vae_tile: tile size of the VAE in pixels. By default images above MAX_UNTILED pixels use
            tiles of TILE pixels, and smaller ones none.
        batch_size: images per batch, all by default; a smaller last batch is padded to it.
        output: "pil", "numpy" (uint8) or "latent" (scaled).
        callback: called as `callback(done, steps)` while the sampling loop runs.
        intermediate_steps: steps, counted from 0, whose latents `Output.intermediates` has.

        `denoising_start` and `denoising_end` run only a part of the process, as fractions of it, so
        that another model can continue with the latents. Raises InputError.
        """
        one_of("output", output, OUTPUTS)
        requests = self.resolve(prompt, image=image, mask=mask, **options)
        if self._auxiliary.load_missing(requests):
            self._update_auxiliary()
        init = InitImage(image, mask, latents)
        tile = self._tile((requests[0].height, requests[0].width), vae_tile)
        count = len(requests)
        size = count if batch_size is None else positive("batch_size", batch_size)
        timer = StageTimer(self.stages)
        results: dict[int, tuple[NDArray, NDArray]] = {}
        with notebook_progress(callback) as progress:
            plan = self._plan(
                requests, init, output != "latent", tile, progress, intermediate_steps
            )
            for numbers, inputs in self._inputs(plan, init, size):
                batch = self._runner.run(inputs, plan, size, timer)
                results |= dict(zip(numbers, zip(*batch, strict=True), strict=True))
        images, pairs = (np.stack([results[i][k] for i in range(count)]) for k in (0, 1))
        return Output(
            images=[Image.fromarray(image) for image in images] if output == "pil" else images,
            requests=requests,
            timings=timer.timings(),
            intermediates=Intermediates.of(plan.intermediate_steps, plan.grid, pairs),
        )

    def decode_latents(
        self, latents: Float[NDArray, "b h w c"], *, vae_tile: int | None = None
    ) -> UInt8[NDArray, "b h2 w2 3"]:
        """Images of scaled latents, such as those of `Output.intermediates`; raises InputError."""
        cell = self.vae.config.downscale
        size = cell * latents.shape[1], cell * latents.shape[2]
        return self._runner.decode_latents(latents, self._tile(size, vae_tile))

    def nfe(self, request: Requests, index: int = 0) -> int:
        """Network evaluations for image `index` of a call (NFE); see `guidance.nfe`."""
        own = request[index]
        grid = jax.tree.map(jnp.asarray, self._grid(Requests([own])))
        first, last = int(grid.first[0]), int(grid.last[0])
        ends_clean = last == int(grid.num_steps[0])
        rule = guidance_rule(request)
        restarts = phase_switches(rule, grid, first, last)
        sampler = get_sampler(own.sampler, own.eta)
        per_step = sampler.nfe(last - first, ends_clean=ends_clean, restarts=restarts)
        return nfe(rule, grid, first, per_step)

    @property
    def loras(self) -> dict[str, float]:
        """The scale of each applied LoRA."""
        return dict(self._loras.scales)

    def load_lora(
        self, source: str | pathlib.Path, scale: float = 1.0, *, name: str | None = None
    ) -> str:
        """Apply the LoRA in a file or folder, besides those already applied; returns its name.

        Compiles nothing. `name` is the file's by default. Raises InputError, with the model
        unchanged, for factors that fit no layer.
        """
        name = self._loras.load(pathlib.Path(source), name, scale)
        self._weights_changed()
        return name

    def set_loras(self, scales: Mapping[str, float]) -> None:
        """Apply loaded LoRAs with other scales; LoRAs that `scales` leaves out are not applied."""
        self._loras.set(scales)
        self._weights_changed()

    def unload_loras(self) -> None:
        """Remove all LoRAs; restores every weight bit for bit."""
        self._loras.remove()
        self._weights_changed()

    @property
    def textual_inversion_tokens(self) -> tuple[str, ...]:
        """The tokens of the loaded textual inversions."""
        return next(iter(self._vocabularies.values())).added_tokens

    @rename_arguments
    def load_textual_inversion(
        self, source: str | pathlib.Path, *, token: str | None = None
    ) -> str:
        """Add the token of a textual inversion file; returns the token, for use in prompts.

        `token` replaces the file's own. Nothing is compiled again. Raises InputError, with the
        model unchanged, for vectors that do not fit and for a token that exists.
        """
        widths = {
            name: encoder.config.hidden_size
            for name, encoder in zip(self._vocabularies, self.text_encoders, strict=True)
        }
        inversion = read_inversion(pathlib.Path(source), widths, token)
        add_inversion(self._vocabularies, inversion)
        self._weights_changed()
        return inversion.token

    def unload_textual_inversions(self) -> None:
        """Remove the tokens of all textual inversions."""
        for vocabulary in self._vocabularies.values():
            vocabulary.reset()
        self._weights_changed()

    def load_classifier(self, folder: str | pathlib.Path) -> None:
        """Load the classifier of noisy latents in `folder`, for `classifier_scale`."""
        self._auxiliary.load_classifier(pathlib.Path(folder))
        self._update_auxiliary()

    def load_clip(self, folder: str | pathlib.Path) -> None:
        """Load the CLIP model in `folder`, for `clip_scale`."""
        self._auxiliary.load_clip(pathlib.Path(folder))
        self._update_auxiliary()

    def set_guidance_model(self, model: "Pipeline | None") -> None:
        """Set the weaker model of autoguidance; None removes it.

        Raises InputError unless it has the same latent channels and noise schedule.
        """
        weaker = None
        if model is not None:
            channels = model.vae.config.latent_channels
            weaker = GuidanceModel(model.stages, model._prompt_tokenizer, channels, model.schedule)
        self._auxiliary.set_guidance_model(weaker, self.vae.config.latent_channels, self.schedule)
        self._update_auxiliary()

    set_guide = set_guidance_model  # its former name

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
        self.stages.set_weights(self.text_encoders, self.network)

    def save(self, folder: str | pathlib.Path) -> None:
        """Write a diffusers folder that PyTorch loads; weights keep their dtype.

        Applied LoRAs are merged into the weights. InputError if textual inversions are loaded,
        which such a folder cannot hold.
        """
        if self.textual_inversion_tokens:
            tokens = ", ".join(self.textual_inversion_tokens)
            raise InputError(
                f"save: got a model with the textual inversions {tokens}, expected none "
                "(pipe.unload_textual_inversions() removes them)"
            )
        write_pipeline(folder, self.parts)

    def _tile(self, size: tuple[int, int], tile: int | None) -> int | None:
        """The side of the VAE's tiles in pixels; None for no tiles."""
        cell = self.vae.config.downscale
        if tile is None:
            return TILE // cell * cell if math.prod(size) > MAX_UNTILED else None
        if tile < 2 * cell or tile % cell:
            raise InputError(
                f"vae_tile: got {tile}, expected a multiple of {cell} that is at least {2 * cell}"
            )
        return tile

    def _plan(
        self,
        requests: Requests,
        init: InitImage,
        decode: bool,
        tile: int | None,
        callback: ProgressCallback | None,
        intermediate_steps: Sequence[int],
    ) -> SamplingPlan:
        grid = self._grid(requests)
        request = requests[0]
        for step in intermediate_steps:
            in_range("intermediate_steps", step, int(max(grid.first)), int(min(grid.last)) - 1)
        return SamplingPlan(
            requests=requests,
            grid=grid,
            start=_start_level(grid, requests, init),
            rule=guidance_rule(requests),
            sampler=get_sampler(request.sampler, request.eta).for_schedule(self.schedule),
            guidance_model=None
            if self._auxiliary.guidance_model is None
            else self._auxiliary.guidance_model.stages,
            decode=decode,
            tile=tile,
            callback=callback,
            intermediate_steps=tuple(sorted(set(intermediate_steps))),
        )

    def _grid(self, requests: Requests) -> TimestepGrid:
        """The timestep grid of each image, with the steps to run, on the host."""
        grids: dict[tuple[int, str | None], TimestepGrid] = {}
        rows, levels = [], self.schedule.num_discrete or MAX_CONTINUOUS_STEPS
        for request in requests:
            steps, spacing = request.steps, request.timestep_spacing
            tokens = request.height * request.width // (2 * self.vae.config.downscale) ** 2
            if (steps, spacing) not in grids:
                grid = make_grid(
                    self.schedule,
                    request.sampler,
                    steps,
                    prediction_type=self.prediction_type,
                    spacing=spacing,
                    options=self.scheduler_options,
                    num_tokens=tokens,
                )
                grids[steps, spacing] = jax.tree.map(np.asarray, grid)
            grid = grids[steps, spacing]
            ends = request.step_range(np.asarray(grid.t[0, :steps]), levels)
            first, last = (np.array([end], np.int32) for end in ends)
            rows.append(grid._replace(first=first, last=last))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)

    def _inputs(
        self, plan: SamplingPlan, init: InitImage, size: int
    ) -> Iterator[tuple[list[int], BatchInputs]]:
        """The images' inputs in batches; warns of truncated prompts."""
        requests, weaker = plan.requests, self._auxiliary.guidance_model
        tokenized = tokenize_requests(
            requests,
            plan.rule,
            self._prompt_tokenizer,
            None if weaker is None else weaker.tokenizer,
            self._auxiliary.guidance_targets(requests, self.tokenizer),
        )
        shape = self._runner.latent_shape(requests[0])
        yield from make_batches(requests, init, tokenized, plan.grid, plan.start, shape, size)


def _start_level(grid: TimestepGrid, requests: Requests, init: InitImage) -> StartLevel:
    """From noise, from initial images with noise, or from latents as noisy as they are."""
    noise, count = np.asarray(grid.init_noise_sigma), len(requests)
    sigma, alpha = noise, None
    if requests[0].denoising_start is not None:
        sigma, alpha = np.zeros(count, np.float32), np.ones(count, np.float32)
    elif init.image is not None:
        # a mask at full strength leaves nothing of what it covers
        full = [request.strength == 1 for request in requests]
        whole = np.array(full) & (init.mask is not None)
        starts = np.arange(count), np.asarray(grid.first)
        sigma = np.where(whole, noise, np.asarray(grid.sigma)[starts])
        alpha = np.where(whole, np.float32(0), np.asarray(grid.alpha)[starts])
    return StartLevel(*cast(Any, (sigma, alpha)))  # of host arrays
