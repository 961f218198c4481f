"""`Pipeline`: a loaded model that generates images from prompts."""

import functools
import hashlib
import pathlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff.checkpoints.pipelines import PipelineComponents, write_pipeline
from jaxdiff.checkpoints.schedulers import SchedulerOptions, prediction_type_of, schedule_of
from jaxdiff.core.aliases import rename_arguments
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import parameter_count
from jaxdiff.core.types import Float, NDArray, UInt8
from jaxdiff.core.validate import one_of, positive
from jaxdiff.families.registry import family_of
from jaxdiff.models.build import param_dict
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.pipeline.addons import Addons
from jaxdiff.pipeline.auxiliary_models import AuxiliaryModels, GuidanceModel
from jaxdiff.pipeline.batches import BatchResult, ImageGenerator, ModelFacts
from jaxdiff.pipeline.compiled_model import CompiledModel, ProgressCallback
from jaxdiff.pipeline.conditioning import PromptTokenizers
from jaxdiff.pipeline.defaults import read_defaults, size_of
from jaxdiff.pipeline.diffusers_arguments import accept_diffusers_arguments
from jaxdiff.pipeline.image_inputs import ImageInput, by_request, with_image_defaults, with_noise
from jaxdiff.pipeline.lora import LoRAManager
from jaxdiff.pipeline.notebook import notebook_progress
from jaxdiff.pipeline.on_mesh import OnMesh
from jaxdiff.pipeline.output import OUTPUTS, Output, check_sizes, collect
from jaxdiff.pipeline.programs import DataParallel
from jaxdiff.pipeline.prompts import PromptTokenizer, tokenizer_of
from jaxdiff.pipeline.request import Options, Request, Requests, resolve
from jaxdiff.pipeline.textual_inversion import TextualInversionManager


class Pipeline(Addons):
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
        mesh: Mesh | None = None,
        folder: pathlib.Path | None = None,
    ) -> None:
        self.family = family_of(parts, name)
        self.parts, self.name, self.devices = parts, name, tuple(devices)
        self.mesh = mesh  # None: every device has all weights
        self.network: Any = parts.components[self.family.network].module
        self.vae = cast(AutoencoderKL, parts.components[self.family.latent_codec].module)
        specs = {spec.component: spec for spec in self.family.text_encoders}
        encoders = {c: cast(CLIPTextModel, parts.components[c].module) for c in specs}
        self.text_encoders = list(encoders.values())
        self.schedule = schedule_of(parts.scheduler)
        self.prediction_type = prediction_type_of(parts.scheduler)
        native = size_of(self.network.config.sample_size, self.vae.config.downscale)
        stored = self.family.defaults | dict(parts.defaults)
        self.defaults = read_defaults(stored, parts.scheduler, native, source=name)
        self.stages = CompiledModel(
            self.family,
            self.text_encoders,
            self.network,
            self.vae,
            prediction_type=self.prediction_type,
            layout=DataParallel(self.devices) if mesh is None else OnMesh(mesh),
        )
        files = {c: parts.tokenizers[spec.tokenizer] for c, spec in specs.items()}
        tokenizers = {c: PromptTokenizer(tokenizer_of(each)) for c, each in files.items()}
        self._tokenizers = PromptTokenizers(
            self.family, tokenizers, closed=self.defaults.closed_vocabulary
        )
        self._loras = LoRAManager({self.family.network: self.network, **encoders})
        self._inversions = TextualInversionManager(tokenizers, encoders, files)
        channels = self.vae.config.latent_channels
        self._auxiliary = AuxiliaryModels(
            GuidanceModel(self.stages, self._tokenizers, channels, self.schedule), folder
        )
        self._facts = ModelFacts(
            family=self.family,
            schedule=self.schedule,
            scheduler_options=SchedulerOptions.from_config(parts.scheduler),
            prediction_type=self.prediction_type,
            vae_scale_factor=self.vae.config.downscale,
            latent_channels=channels,
        )
        self._generator = ImageGenerator(
            self._facts, self.stages, self._tokenizers, self._auxiliary
        )

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
        return self._tokenizers.first.tokenizer

    @property
    def is_inpainting(self) -> bool:
        """Whether the network takes a mask and a masked image, as inpainting models do."""
        return self.family.uses_mask

    @property
    def device_name(self) -> str:
        """Number and kind of the devices, such as "4 x TPU v5 lite", and their mesh if any."""
        name = f"{len(self.devices)} x {self.devices[0].device_kind}"
        return name if self.mesh is None else f"{name} ({self.stages.layout})"

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
        image: ImageInput = None,
        mask: ImageInput = None,
        latents: Any = None,
        **options: Unpack[Options],
    ) -> Requests:
        """The complete requests that a call with these arguments would run; raises InputError."""
        facts, images = self._facts, {}
        if image is not None or mask is not None:
            images = by_request(image, mask, facts.latent_channels)
            options = cast(Options, with_image_defaults(options, images, facts.vae_scale_factor))
        requests = resolve(
            self.defaults,
            prompt,
            family=self.family,
            vae_scale_factor=facts.vae_scale_factor,
            images=images,
            **options,
        )
        if latents is not None:
            requests = with_noise(requests, latents, facts.latent_shape(requests[0]))
        if image is not None or options.get("denoising_end") is not None:
            facts.grid(requests)  # raises where no step is left
        return requests

    @accept_diffusers_arguments
    @rename_arguments
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: ImageInput = None,
        mask: ImageInput = None,
        latents: Any = None,
        vae_tile: int | None = None,
        batch_size: int | None = None,
        output: str = "pil",
        callback: ProgressCallback | None = None,
        intermediate_steps: Sequence[int] = (),
        **options: Unpack[Options],
    ) -> Output:
        """Generate one image per prompt; a single prompt serves several seeds, scales or images.

        `options` are those of `request.Options`; None takes the model's default, which
        `pipe.defaults` has.

        image, mask: initial images (PIL, uint8, or files) that `strength` changes, or scaled
            latents. The mask is white where the image is repainted and black where it is kept.
        latents: unit-variance noise (b, h, w, c) instead of that of the seeds.
        vae_tile: tile size of the VAE in pixels. By default images above tiling.MAX_UNTILED pixels
            use tiles of tiling.TILE pixels, and smaller ones none.
        batch_size: images per batch, all by default; a smaller last batch is padded to it.
        output: "pil", "numpy" (uint8) or "latent" (scaled).
        callback: called as `callback(done, steps)` while the sampling loop runs.
        intermediate_steps: steps, counted from 0, whose latents `Output.intermediates` has.

        `denoising_start` and `denoising_end` run only a part of the process, as fractions of it, so
        that another model can continue with the latents. Raises InputError.
        """
        one_of("output", output, OUTPUTS)
        return self.generate(
            self.resolve(prompt, image=image, mask=mask, latents=latents, **options),
            vae_tile=vae_tile,
            batch_size=batch_size,
            output=output,
            callback=callback,
            intermediate_steps=intermediate_steps,
        )

    def generate(
        self,
        requests: Sequence[Request],
        *,
        output: str = "pil",
        callback: ProgressCallback | None = None,
        intermediate_steps: Sequence[int] = (),
        **settings: Any,
    ) -> Output:
        """Generate the images of `requests`, such as `resolve` gives; the rest as in a call."""
        check_sizes(requests, output, intermediate_steps)
        in_notebook = "IPython" in sys.modules and callback is None
        with notebook_progress() if in_notebook else nullcontext(callback) as shown:
            settings |= {"callback": shown, "intermediate_steps": intermediate_steps}
            results = list(self._batches(requests, output=output, **settings))
        return collect(requests, results, output=output, intermediate_steps=intermediate_steps)

    def stream(
        self, requests: Sequence[Request], *, output: str = "pil", **settings: Any
    ) -> Iterator[tuple[list[int], Output]]:
        """Like `generate`, batch by batch: the numbers of requests, and the output of these."""
        for result in self._batches(requests, output=output, **settings):
            numbers = result.numbers
            own = result._replace(numbers=list(range(len(numbers))))
            yield numbers, collect([requests[i] for i in numbers], [own], output=output)

    def _batches(
        self,
        requests: Sequence[Request],
        *,
        output: str,
        vae_tile: int | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        intermediate_steps: Sequence[int] = (),
    ) -> Iterator[BatchResult]:
        if any(request.classifier_scale or request.clip_scale for request in requests):
            self._auxiliary.load_missing(Requests(requests))
        return self._generator.generate(
            requests,
            batch_size=positive("batch_size", len(requests) if batch_size is None else batch_size),
            decode=output != "latent",
            vae_tile=vae_tile,
            callback=callback,
            intermediate_steps=sorted(set(intermediate_steps)),
        )

    def decode_latents(
        self, latents: Float[NDArray, "b h w c"], *, vae_tile: int | None = None
    ) -> UInt8[NDArray, "b h2 w2 3"]:
        """Images of scaled latents, such as those of `Output.intermediates`; raises InputError."""
        return self._generator.decode_latents(latents, vae_tile)

    def nfe(self, requests: Requests, index: int = 0) -> int:
        """Network evaluations for image `index` of a call (NFE); see `guidance.nfe`."""
        return self._generator.nfe(requests, index)

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
