"""A model that generates, as shapes: what its programs run, and what a batch looks like."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.checkpoints.model_options import ModelOptions
from jaxdiff.checkpoints.pipelines import IMAGE_ENCODER
from jaxdiff.checkpoints.schedulers import SchedulerOptions
from jaxdiff.checkpoints.timestep_grids import make_grid
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import dtype_of
from jaxdiff.core.validate import positive
from jaxdiff.diffusion.grids import TimestepGrid
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.families.base import Family
from jaxdiff.families.text_outputs import num_tokens
from jaxdiff.guidance.base import Guidance, parse
from jaxdiff.models.latent_codec import LatentCodec
from jaxdiff.pipeline.conditioning import TokenizedPrompts
from jaxdiff.pipeline.defaults import Defaults, model_defaults
from jaxdiff.planning.published_models import published_model

S = jax.ShapeDtypeStruct
# Options that are those of a call.
CALL = ("steps", "sampler", "guidance", "guidance_scale", "height", "width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions(ModelOptions):
    """Compile what generates images for absent TPUs or GPUs; report memory and time.

    These are the text encoders, the sampling loop and the decoder. Without a mesh every chip runs
    the same programs on its own images, so nothing is sent.
    """

    plan: tuple[str, ...]
    """Topologies, such as v5e:2x4 or h200:8."""
    model: str = dataclasses.field()
    """A diffusers folder or a checkpoint file, whose weights are not read, or the name of a
    published repository, of which nothing is."""
    vae: str | None = None
    """A VAE instead of the model's own (also TAESD): a folder or a file."""
    base: str | None = None
    """A diffusers folder with what a checkpoint file lacks: text encoders, tokenizers, VAE,
    schedule."""
    batch_size: int = 8
    """Images per batch, over all devices together."""
    steps: int | None = None
    """Number of denoising steps. Default: the model's."""
    sampler: str | None = None
    """Sampler; `jaxdiff generate --help` lists them, and the guidance rules. Default: the
    model's."""
    guidance: str | None = None
    """Guidance rule. Default: the model's."""
    guidance_scale: float | None = None
    """Guidance scale; 1 runs one stream. Default: the model's."""
    height: int | None = None
    """Height in pixels. Default: the size that the model was trained at."""
    width: int | None = None
    """Width in pixels."""
    mesh: str | None = None
    """Share weights and work between devices, such as fsdp=4,tensor=2 or guidance=2."""
    offload: str | None = None
    """What leaves the devices while it is not needed: text, the text encoders."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    find_max_batch: bool = True
    """Also find the largest batch that fits."""
    json: bool = False
    """Print one JSON object."""


class SampledModel(NamedTuple):
    """What the programs run, and what their shapes depend on."""

    family: Family
    network: Any  # the adapter
    codec: LatentCodec
    text_encoders: Mapping[str, Any]  # by component
    components: Mapping[str, nnx.Module]  # all that have weights on the devices
    schedule: Schedule
    scheduler_options: SchedulerOptions
    prediction_type: str
    defaults: Defaults
    num_tokens: int  # of a prompt within one window of the text encoders

    def with_defaults(self, options: SamplingOptions) -> SamplingOptions:
        """`options` with the model's defaults where they have none; raises InputError."""
        own = {
            name: getattr(self.defaults, name) for name in CALL if getattr(options, name) is None
        }
        complete = dataclasses.replace(options, **own)
        if complete.sampler is None:
            raise InputError("sampler: got none, expected one, as the model has no default")
        positive("steps", cast(int, complete.steps))
        positive("batch_size", complete.batch_size)
        return complete

    def size(self, options: SamplingOptions) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        complete = self.with_defaults(options)
        return cast(int, complete.height), cast(int, complete.width)

    def latents(self, options: SamplingOptions, batch_size: int) -> jax.ShapeDtypeStruct:
        """The latents of a batch as a shape."""
        height, width = self.size(options)
        return S((batch_size, *self.codec.latent_shape(height, width)), jnp.float32)

    def rule(self, options: SamplingOptions) -> Guidance:
        """The guidance rule, with the fewest streams."""
        complete = self.with_defaults(options)
        guidance = self.defaults.with_clipping(cast(str, complete.guidance))
        rule = parse(guidance).for_prompts(1)
        return rule.simplify([cast(float, complete.guidance_scale)])

    def grid(self, options: SamplingOptions) -> TimestepGrid:
        """The timestep grid of one image; raises InputError."""
        complete, (height, width) = self.with_defaults(options), self.size(options)
        return make_grid(
            self.schedule,
            cast(str, complete.sampler),
            cast(int, complete.steps),
            prediction_type=self.prediction_type,
            spacing=self.defaults.timestep_spacing,
            options=self.scheduler_options,
            num_tokens=height * width // (2 * self.codec.config.downscale) ** 2,
        )

    def prompts(self, options: SamplingOptions, batch_size: int) -> TokenizedPrompts:
        """The prompts of a batch as shapes, each within one window of the text encoders."""
        streams = len(self.rule(options).streams)
        lengths = [
            spec.num_tokens(self.text_encoders[spec.component])
            for spec in self.family.text_encoders
        ]
        return TokenizedPrompts(
            ids=cast(Any, tuple(S((batch_size, streams, 1, n), jnp.int32) for n in lengths)),
            weights=cast(Any, tuple(S((batch_size, streams, 1, n), jnp.float32) for n in lengths)),
            zero_out=cast(Any, S((batch_size, streams), jnp.bool_)),
        )

    def conditioning(
        self, x: jax.ShapeDtypeStruct, *leading: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning for latents x as shapes, with these leading axes."""
        shapes = self.network.conditioning_shapes(x.shape[1:-1], self.num_tokens)
        return {name: S((*leading, *leaf.shape), leaf.dtype) for name, leaf in shapes.items()}


def sampled_model(options: SamplingOptions) -> SampledModel:
    """The model of `options` as shapes; raises InputError."""
    dtype = dtype_of(options.dtype)
    family, parts = published_model(options.model, dtype, **options.components())
    modules: dict[str, Any] = {name: each.module for name, each in parts.components.items()}
    prediction_type = family.prediction_type(parts.scheduler)
    texts = {spec.component: modules[spec.component] for spec in family.text_encoders}
    network = family.adapter(modules[family.network], prediction_type)
    own = {name: modules[name] for name in (IMAGE_ENCODER,) if name in modules}
    own[family.network] = network.module
    codec = {} if family.latent_codec is None else {family.latent_codec: family.codec(modules)}
    return SampledModel(
        family=family,
        network=network,
        codec=family.codec(modules),
        text_encoders=texts,
        components=cast(Any, {**own, **codec, **texts}),
        schedule=family.schedule(parts.scheduler),
        scheduler_options=SchedulerOptions.from_config(parts.scheduler, parts.class_name),
        prediction_type=prediction_type,
        defaults=model_defaults(parts, family, options.model),
        num_tokens=num_tokens(family, modules),
    )
