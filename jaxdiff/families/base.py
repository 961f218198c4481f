"""A family of models: which networks it has, and how their conditioning is made.

A family is data, and a file in this folder: the component that denoises and its adapter, the text
encoders with what each of them gives and how that is joined, the latent codec, the noise schedule,
defaults, and the extras, which are inputs of the network beside the text.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.checkpoints.schedulers import prediction_type_of, schedule_of
from jaxdiff.core.types import Array, Bool, Float, Int, NDArray
from jaxdiff.data.texts import ID_COLUMNS
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.families.extras import Extra, ExtraInputs, Option
from jaxdiff.models.latent_codec import LatentCodec, Pixels
from jaxdiff.models.text_encoder import TextModel


class TextEncoderOutput(NamedTuple):
    """What a text encoder, or all of them, give the network; leading axes b, or b and k."""

    hidden_states: Float[Array, "*b n d"] | None
    pooled: Float[Array, "*b p"] | None = None
    mask: Bool[Array, "*b n"] | None = None  # which tokens are text, not padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder of a family, and which of its outputs the network gets."""

    component: str = "text_encoder"
    tokenizer: str = "tokenizer"
    # "last" hidden states, after the final norm, or "penultimate" without it; None: no states
    layer: str | None = "last"
    pooled: bool = False  # whether the network gets the pooled embedding of this encoder
    length: int | None = None  # tokens of a text; None: as many as its tokenizer says
    # the most that a request may ask for as max_sequence_length; None: the length is fixed
    max_length: int | None = None
    # parts of so many tokens that a longer text has at most, the rest is cut; None: MAX_CHUNKS
    max_chunks: int | None = None
    # which prompt of a request it reads, 1 to 3; None: that of its place among the text encoders,
    # and from the fourth on the first
    prompt: int | None = None
    skips_layers: bool = True  # clip_skip counts
    masks_padding: bool = False  # padding is hidden from the encoder itself
    lowercases: bool = False  # texts are read in lower case
    # the network's argument for the mask of tokens that are text; None: it gets none
    mask: str | None = None

    def encode(
        self, encoder: TextModel, ids: Int[Array, "b n"], skip: int = 0
    ) -> TextEncoderOutput:
        """The outputs that the network gets for token ids, without `skip` layers at the end."""
        masked = {"masks_padding": True} if self.masks_padding else {}
        features = encoder.features(ids, skip if self.skips_layers else 0, **masked)
        states = {None: None, "last": features.last, "penultimate": features.penultimate}
        return TextEncoderOutput(
            states[self.layer],
            features.pooled if self.pooled else None,
            features.mask if self.mask else None,
        )

    def num_tokens(self, encoder: TextModel) -> int:
        """How many tokens of a text the network gets."""
        return self.length or encoder.config.max_position_embeddings


# The outputs of the text encoders, by component in the order of the family, as one.
Join = Callable[[Mapping[str, TextEncoderOutput]], TextEncoderOutput]


def join_features(outputs: Mapping[str, TextEncoderOutput]) -> TextEncoderOutput:
    """Hidden states side by side, and pooled embeddings too."""
    return _joined(outputs, -1)


def join_tokens(outputs: Mapping[str, TextEncoderOutput]) -> TextEncoderOutput:
    """Hidden states one after the other, pooled embeddings side by side."""
    return _joined(outputs, -2)


def _joined(outputs: Mapping[str, TextEncoderOutput], axis: int) -> TextEncoderOutput:
    states = [each.hidden_states for each in outputs.values() if each.hidden_states is not None]
    pooled = [each.pooled for each in outputs.values() if each.pooled is not None]
    return TextEncoderOutput(
        jnp.concatenate(states, axis=axis) if states else None,
        jnp.concatenate(pooled, axis=-1) if pooled else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models."""

    name: str
    network: str  # the component that denoises
    network_class: type[nnx.Module]
    adapter: Callable[..., Any]  # (module, prediction type) -> its adapter
    latent_codec: str | None = "vae"  # the component; None: the network denoises pixels
    # the denoiser -> the codec of the embeddings of images that it generates instead of images
    embeddings: Callable[[Any], LatentCodec] | None = None
    # the component whose embeddings of images the network generates or reads
    image_encoder: str | None = None
    latent_multiple: int = 1  # sides of latents are multiples of it
    latent_mask: Callable[[NDArray], NDArray] = np.asarray  # masks of latents -> where they change
    latent_limit: int | None = None  # the longest side of latents with positions; None: no limit
    # strengths (b,) -> alpha and sigma of images to begin with; None: those of the first step
    image_level: Callable[[NDArray], tuple[NDArray, NDArray]] | None = None
    # scheduler_config.json -> the noise schedule, and what the network predicts
    schedule: Callable[[Mapping[str, Any]], Schedule] = schedule_of
    prediction_type: Callable[[Mapping[str, Any]], str] = prediction_type_of
    # of options of requests, where a model has none of its own
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    text_encoders: tuple[TextEncoder, ...] = (TextEncoder(),)
    join: Join = join_features  # how the outputs of several text encoders become one
    states_argument: str = "context"  # the network's argument for hidden states
    pooled_argument: str = "text_embeds"  # for the pooled embedding
    zero_uncond: bool = False  # a negative prompt that was not given is zeros, not the empty text
    extras: tuple[Extra, ...] = ()

    def codec(self, modules: Mapping[str, Any]) -> LatentCodec:
        """The latent codec among `modules` by component, or that of pixels or embeddings."""
        if self.embeddings is not None:
            return self.embeddings(modules[self.network])
        return Pixels() if self.latent_codec is None else modules[self.latent_codec]

    @property
    def id_columns(self) -> dict[str, str]:
        """The column of training batches with the token ids of each text encoder."""
        pairs = zip(self.text_encoders, ID_COLUMNS, strict=False)
        return {spec.component: column for spec, column in pairs}

    @property
    def prompt_numbers(self) -> tuple[int, ...]:
        """The prompt of a request that each text encoder reads, 1 to 3."""
        places = (1, 2, 3) + (1,) * len(self.text_encoders)
        pairs = zip(self.text_encoders, places, strict=False)
        return tuple(spec.prompt or place for spec, place in pairs)

    @property
    def has_pooled(self) -> bool:
        """Whether the network takes a pooled embedding."""
        return any(encoder.pooled for encoder in self.text_encoders)

    @property
    def skips_layers(self) -> bool:
        """Whether the network gets hidden states of a text encoder that clip_skip changes."""
        return any(spec.skips_layers and spec.layer is not None for spec in self.text_encoders)

    @property
    def options(self) -> dict[str, Option]:
        """The options of a request that the extras read."""
        return {name: option for extra in self.extras for name, option in extra.options.items()}

    @property
    def request_defaults(self) -> dict[str, Any]:
        """Defaults of options of requests: the family's own, and those of the extras."""
        extras = {name: value for extra in self.extras for name, value in extra.defaults.items()}
        return {**self.defaults, **extras}

    @property
    def reads_prompt(self) -> bool:
        """Whether prompts count."""
        return bool(self.text_encoders) or any(extra.reads_prompt for extra in self.extras)

    @property
    def uses_guidance_scale(self) -> bool:
        """Whether the network takes the guidance scale, as guidance-distilled ones do."""
        return any(extra.uses_guidance_scale for extra in self.extras)

    @property
    def uses_mask(self) -> bool:
        """Whether the network takes a mask and a masked image, as inpainting models do."""
        return any(extra.uses_mask for extra in self.extras)

    @property
    def uses_image(self) -> bool:
        """Whether the network sees the initial image, as those that edit images do."""
        return any(extra.uses_image for extra in self.extras)

    @property
    def enlarges(self) -> bool:
        """Whether the network enlarges an image."""
        return any(extra.enlarges for extra in self.extras)

    def request_conditioning(self, inputs: ExtraInputs) -> dict[str, NDArray]:
        """The conditioning beside the text for a batch of requests."""
        values = {extra.argument: extra.of_request(inputs) for extra in self.extras}
        return {name: array for name, array in values.items() if array is not None}

    def batch_conditioning(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> dict[str, Array]:
        """The conditioning beside the text for a training batch, with `dropped` captions."""
        values = {extra.argument: extra.of_batch(batch, dropped) for extra in self.extras}
        return {name: array for name, array in values.items() if array is not None}

    def caption_columns(self, captions: Sequence[str]) -> dict[str, NDArray]:
        """The columns of training batches that extras make of captions."""
        return {name: a for extra in self.extras for name, a in extra.columns(captions).items()}

    def text_conditioning(self, outputs: Sequence[TextEncoderOutput]) -> dict[str, Array]:
        """The outputs of all text encoders as conditioning of the network."""
        if not self.text_encoders:
            return {}
        pairs = list(zip(self.text_encoders, outputs, strict=True))
        joined = self.join({spec.component: output for spec, output in pairs})
        conditioning = {self.states_argument: joined.hidden_states}
        conditioning[self.pooled_argument] = joined.pooled
        conditioning |= {spec.mask: output.mask for spec, output in pairs if spec.mask is not None}
        return {name: array for name, array in conditioning.items() if array is not None}


def select_rows(
    condition: Bool[Array, "*b"], first: TextEncoderOutput, second: TextEncoderOutput
) -> TextEncoderOutput:
    """For each text `first` where `condition` is true, else `second`."""

    def select(own: Array, other: Array) -> Array:
        axes = tuple(range(condition.ndim, other.ndim))
        return jnp.where(jnp.expand_dims(condition, axes), own, other)

    return jax.tree.map(select, first, second)


def zero_rows(condition: Bool[Array, "*b"], output: TextEncoderOutput) -> TextEncoderOutput:
    """`output` with zeros for the texts where `condition` is true."""
    zeros = jax.tree.map(jnp.zeros_like, output)._replace(mask=output.mask)
    return select_rows(condition, zeros, output)
