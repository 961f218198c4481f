"""A model that is loaded: its networks and settings, described, with add-ons, and saved again."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxdiff.checkpoints.model_registry import arguments
from jaxdiff.checkpoints.pipelines import PipelineComponents, write_pipeline
from jaxdiff.checkpoints.schedulers import SchedulerOptions
from jaxdiff.checkpoints.tokenizers import tokenizer_digest
from jaxdiff.core.configs import non_default_fields
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import content_digest, parameter_count
from jaxdiff.core.types import Float, NDArray, UInt8
from jaxdiff.core.validate import check_shape
from jaxdiff.diffusion.schedules import EDMSchedule, Schedule
from jaxdiff.families.detection import family_of
from jaxdiff.models.build import param_dict
from jaxdiff.models.latent_codec import Pixels
from jaxdiff.pipeline.addons import Addons
from jaxdiff.pipeline.auxiliary_models import AuxiliaryModels, GuidanceModel
from jaxdiff.pipeline.batches import ImageGenerator, ModelFacts, tile_size
from jaxdiff.pipeline.compiled_model import CompiledModel
from jaxdiff.pipeline.conditioning import PromptTokenizers
from jaxdiff.pipeline.cost import nfe
from jaxdiff.pipeline.defaults import model_defaults
from jaxdiff.pipeline.image_embedder import ImageEmbedder
from jaxdiff.pipeline.lora import LoRAManager
from jaxdiff.pipeline.nonfinite import check_finite
from jaxdiff.pipeline.offload import OffloadedModel, check_offload
from jaxdiff.pipeline.on_mesh import OnMesh
from jaxdiff.pipeline.programs import DataParallel
from jaxdiff.pipeline.prompts import PromptTokenizer
from jaxdiff.pipeline.request import Request
from jaxdiff.pipeline.textual_inversion import TextualInversionManager
from jaxdiff.pipeline.tokenizers import tokenizer_of

# Fields of configs that change no image: a request has its size, and tokenizers their ids.
INFORMATIVE = ("sample_size", "pad_token_id", "bos_token_id", "projection_dim")


class LoadedModel(Addons):
    """The networks of a model, which run compiled on its devices.

    `network` and `text_encoders` are modules that you can call; components also have their own
    names, such as `unet` and `vae`, and `text_encoder` is the first text encoder. `codec` is the
    VAE, or that of pixels.
    """

    def __init__(
        self,
        parts: PipelineComponents,
        *,
        name: str,
        devices: Sequence[jax.Device],
        mesh: Mesh | None = None,
        offload: str | None = None,
        folder: pathlib.Path | None = None,
    ) -> None:
        self.family = family_of(parts, name)
        self.parts, self.name, self.devices = parts, name, tuple(devices)
        self.mesh = mesh  # None: every device has all weights
        self.offload = offload  # "text": the text encoders are on the host while sampling
        modules: dict[str, Any] = {n: each.module for n, each in parts.components.items()}
        self.network, self.codec = modules[self.family.network], self.family.codec(modules)
        specs = {spec.component: spec for spec in self.family.text_encoders}
        encoders = {component: modules[component] for component in specs}
        self.text_encoders = list(encoders.values())
        self.schedule = self.family.schedule(parts.scheduler)
        self.prediction_type = self.family.prediction_type(parts.scheduler)
        self.adapter = self.family.adapter(self.network, self.prediction_type)
        self.defaults = model_defaults(parts, self.family, name)
        model = CompiledModel if check_offload(offload) is None else OffloadedModel
        self.stages = model(
            self.family,
            self.text_encoders,
            self.adapter,
            _of_unit_variance(self.codec, self.schedule),
            layout=DataParallel(self.devices) if mesh is None else OnMesh(mesh),
        )
        self.image_embedder = ImageEmbedder(parts, self.stages, name)
        files = {c: parts.tokenizers[spec.tokenizer] for c, spec in specs.items()}
        tokenizers = {
            c: PromptTokenizer(tokenizer_of(each, specs[c].length, lowercases=specs[c].lowercases))
            for c, each in files.items()
        }
        self._tokenizers = PromptTokenizers(
            self.family, tokenizers, closed=self.defaults.closed_vocabulary
        )
        loras = {self.family.network: self.network, **encoders}
        self._loras = LoRAManager(loras, self.family.name)
        self._inversions = TextualInversionManager(tokenizers, encoders, files)
        self._auxiliary = AuxiliaryModels(
            GuidanceModel(
                self.stages,
                self._tokenizers,
                self.codec.config.latent_channels,
                self.schedule,
                denoises_pixels=isinstance(self.codec, Pixels),
            ),
            folder,
        )
        self._facts = ModelFacts(
            family=self.family,
            schedule=self.schedule,
            scheduler_options=SchedulerOptions.from_config(parts.scheduler, parts.class_name),
            network=self.adapter,
            codec=self.codec,
            image_prompts=self.image_embedder.of_requests,
        )
        self._generator = ImageGenerator(
            self._facts, self.stages, self._tokenizers, self._auxiliary
        )

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
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
        # The components by name: pipe.unet, pipe.transformer, pipe.vae.
        if name != "parts" and name in self.parts.components:
            return self.parts.components[name].module
        raise AttributeError(f"'Pipeline' object has no attribute {name!r}")

    @property
    def text_encoder(self) -> Any:
        """The first text encoder; None if there is none."""
        return self.text_encoders[0] if self.text_encoders else None

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's tokenizer."""
        return self._tokenizers.first.tokenizer

    @property
    def device_name(self) -> str:
        """Number and kind of the devices, such as "4 x TPU v5 lite", and their mesh if any."""
        name = f"{len(self.devices)} x {self.devices[0].device_kind}"
        return name if self.mesh is None else f"{name} ({self.stages.layout})"

    @property
    def fingerprint(self) -> str:
        """A short hash of all that the images depend on beside a request.

        These are the configs of every network and the weights as they are now, their dtypes, the
        tokenizers and the scheduler config; auxiliary networks have hashes of their own.
        """
        parts, digests = self.parts, []
        for _, component in sorted(parts.components.items()):
            digests.append(content_digest(param_dict(component.module)))
            for config in arguments(component.module):
                own = {k: v for k, v in non_default_fields(config).items() if k not in INFORMATIVE}
                digests.append(json.dumps(own, sort_keys=True))
        digests += [tokenizer_digest(files) for _, files in sorted(parts.tokenizers.items())]
        digests.append(json.dumps(parts.scheduler, sort_keys=True))
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:12]

    def decode_latents(
        self, latents: Float[NDArray, "b h w c"], *, vae_tile: int | None = None
    ) -> UInt8[NDArray, "b h2 w2 3"]:
        """Images of scaled latents, such as those of `Output.intermediates`.

        In tiles of `vae_tile` pixels; None: only of large images. InputError for latents of
        another model, and for images that are not finite.
        """
        channels, downscale = self.codec.config.latent_channels, self.codec.config.downscale
        check_shape("latents", latents, (None, None, None, channels))
        count = len(latents)
        height, width = (downscale * side for side in latents.shape[1:3])
        padded = latents[self._generator.padding(count, count)]
        tile = tile_size(vae_tile, (height, width), downscale)
        images, finite = self._generator.decode(self.stages.shard(padded), tile)
        check_finite("latents", finite[:count])
        return images[:count]

    def nfe(self, requests: Sequence[Request], index: int = 0) -> int:
        """Network evaluations for image `index` of a call (NFE); see `guidance.nfe`."""
        return nfe(self._facts, requests, index)

    def start_alpha(self, requests: Sequence[Request]) -> Float[NDArray, "b"]:
        """alpha of the noise level from which the steps of each image begin."""
        grid = self._facts.grid(requests)
        return np.asarray(grid.alpha)[np.arange(len(requests)), np.asarray(grid.first)]

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


def _of_unit_variance(codec: Any, schedule: Schedule) -> Any:
    """`codec` with latents that are divided by the standard deviation that EDM gives them."""
    if not isinstance(schedule, EDMSchedule):
        return codec
    scaled = nnx.merge(*nnx.split(codec))
    factor = codec.config.scaling_factor / schedule.sigma_data
    scaled.config = dataclasses.replace(codec.config, scaling_factor=factor)
    return scaled
