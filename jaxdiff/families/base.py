"""A family of models: which networks it has, and how their conditioning is made.

A family is data, and a file in this folder: the component that denoises and its adapter, the text
encoders with what each of them gives and how that is joined, the latent codec, the noise schedule,
defaults, and the extras, which are inputs of the network beside the text. An extra declares the
options of a request that it reads, checks them, and makes its entry of the network's conditioning,
for requests and for training batches.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.checkpoints.schedulers import prediction_type_of, schedule_of
from jaxdiff.core.types import Array, Bool, Float, Int, NDArray
from jaxdiff.core.validate import in_range
from jaxdiff.data.texts import ID_COLUMNS, STATE_COLUMNS
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.models.latent_codec import LatentCodec, Pixels
from jaxdiff.models.text_encoder import TextModel


class Option(NamedTuple):
    """An option of a request that an extra reads: its type, default, and range of its numbers."""

    annotation: Any
    default: Any
    low: float
    high: float

    def is_column(self, value: Any) -> bool:
        """Whether `value` is a sequence of one value for each image."""
        is_pair = any(get_origin(choice) is tuple for choice in get_args(self.annotation))
        sequence = isinstance(value, list | tuple | np.ndarray)
        return sequence and not (is_pair and all(np.ndim(v) == 0 and v is not None for v in value))

    def check(self, name: str, value: Any) -> None:
        """InputError for a number beyond the range."""
        for number in np.ravel(() if value is None else value):
            in_range(name, number.item(), self.low, self.high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtraInputs:
    """What a batch of b images with K streams each has for extras."""

    size: tuple[int, int]  # height and width in pixels
    # of the request of each image, where they are not the defaults
    options: Sequence[Mapping[str, Any]]
    prompted: tuple[bool, ...]  # which of the K streams get the prompt
    texts: Sequence[Sequence[str | None]]  # of each image, what its streams read; None: nothing
    guidance_scales: Float[NDArray, "b"]
    image: Float[NDArray, "b h2 w2 3"] | None = None  # in [-1, 1]
    mask: Float[NDArray, "b h2 w2 1"] | None = None  # 1 where the image is repainted
    # images in [-1, 1] -> scaled latents, and a mask of pixels -> of latents
    encode: Callable[[NDArray], Float[NDArray, "b h w c"]]
    downsample: Callable[[NDArray], Float[NDArray, "b h w 1"]]

    def for_streams(self, array: Float[NDArray, "b *d"]) -> Float[NDArray, "b k *d"]:
        """One value per image for all of its streams."""
        return np.repeat(array[:, None], len(self.prompted), axis=1)


class Extra(ABC):
    """An input of the network beside the text."""

    argument: ClassVar[str]  # of the network's adapter
    options: ClassVar[Mapping[str, Option]] = {}  # of a request
    defaults: ClassVar[Mapping[str, Any]] = {}  # of other options, for models that have the extra
    uses_mask: ClassVar[bool] = False  # the network sees the mask: known latents are not put back
    reads_prompt: ClassVar[bool] = False  # `ExtraInputs.texts`, as text encoders do
    untrainable: ClassVar[str | None] = None  # why no model that has it can be trained

    def check(self, settings: Mapping[str, Any], texts: Sequence[str]) -> None:
        """InputError for a request that the model does not work with.

        `settings` are its guidance rule and the options of extras, `texts` its prompts.
        """
        del settings, texts

    def columns(self, captions: Sequence[str]) -> dict[str, NDArray]:
        """Columns of training batches that are made of captions."""
        del captions
        return {}

    @abstractmethod
    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k *d"]:
        """The values of each stream of each image."""

    @abstractmethod
    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """The values of each image of a training batch; `dropped` captions count as none."""


class TextEncoderOutput(NamedTuple):
    """What one text encoder gives the network; leading axes b, or b and k."""

    hidden_states: Float[Array, "*b n d"]
    pooled: Float[Array, "*b p"] | None = None
    mask: Bool[Array, "*b n"] | None = None  # which tokens are text, not padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder of a family, and which of its outputs the network gets."""

    component: str = "text_encoder"
    tokenizer: str = "tokenizer"
    layer: str = "last"  # "last" hidden states, after the final norm, or "penultimate" without it
    pooled: bool = False  # whether the network gets the pooled embedding of this encoder
    length: int | None = None  # tokens of a text; None: as many as its tokenizer says
    # the network's argument for the mask of tokens that are text; None: it gets none
    mask: str | None = None

    def encode(
        self, encoder: TextModel, ids: Int[Array, "b n"], skip: int = 0
    ) -> TextEncoderOutput:
        """The outputs that the network gets for token ids, without `skip` layers at the end."""
        features = encoder.features(ids, skip)
        states = features.last if self.layer == "last" else features.penultimate
        pooled, mask = features.pooled, features.mask
        return TextEncoderOutput(
            cast(Array, states), pooled if self.pooled else None, mask if self.mask else None
        )

    def num_tokens(self, encoder: TextModel) -> int:
        """How many tokens of a text the network gets."""
        return self.length or encoder.config.max_position_embeddings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models."""

    name: str
    network: str  # the component that denoises
    network_class: type[nnx.Module]
    adapter: Callable[..., Any]  # (module, prediction type) -> its adapter
    latent_codec: str | None = "vae"  # the component; None: the network denoises pixels
    # scheduler_config.json -> the noise schedule, and what the network predicts
    schedule: Callable[[Mapping[str, Any]], Schedule] = schedule_of
    prediction_type: Callable[[Mapping[str, Any]], str] = prediction_type_of
    # of options of requests, where a model has none of its own
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    text_encoders: tuple[TextEncoder, ...] = (TextEncoder(),)
    # how the hidden states of several encoders become one context: side by side as "features", or
    # one after the other as "tokens"
    joined_as: str = "features"
    states_argument: str = "context"  # the network's argument for hidden states
    pooled_argument: str = "text_embeds"  # for the pooled embedding
    zero_uncond: bool = False  # a negative prompt that was not given is zeros, not the empty text
    extras: tuple[Extra, ...] = ()

    def codec(self, modules: Mapping[str, Any]) -> LatentCodec:
        """The latent codec among `modules` by component, or that of pixels."""
        return Pixels() if self.latent_codec is None else modules[self.latent_codec]

    @property
    def components(self) -> tuple[str, ...]:
        """The networks: the one that denoises, the latent codec, the text encoders."""
        codec = () if self.latent_codec is None else (self.latent_codec,)
        return self.network, *codec, *(each.component for each in self.text_encoders)

    @property
    def id_columns(self) -> dict[str, str]:
        """The column of training batches with the token ids of each text encoder."""
        return self._columns(ID_COLUMNS)

    @property
    def state_columns(self) -> dict[str, str]:
        """The column of training batches with the cached hidden states of each text encoder."""
        return self._columns(STATE_COLUMNS)

    def _columns(self, names: Sequence[str]) -> dict[str, str]:
        return {e.component: n for e, n in zip(self.text_encoders, names, strict=False)}

    def num_tokens(self, modules: Mapping[str, Any]) -> int:
        """How many tokens of a text the network gets from the encoders among `modules`."""
        counts = [each.num_tokens(modules[each.component]) for each in self.text_encoders]
        return sum(counts) if self.joined_as == "tokens" else max(counts, default=0)

    @property
    def has_pooled(self) -> bool:
        """Whether the network takes a pooled embedding."""
        return any(encoder.pooled for encoder in self.text_encoders)

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
    def uses_mask(self) -> bool:
        """Whether the network takes a mask and a masked image, as inpainting models do."""
        return any(extra.uses_mask for extra in self.extras)

    def request_conditioning(self, inputs: ExtraInputs) -> dict[str, NDArray]:
        """The conditioning beside the text for a batch of requests."""
        return {extra.argument: extra.of_request(inputs) for extra in self.extras}

    def batch_conditioning(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> dict[str, Array]:
        """The conditioning beside the text for a training batch, with `dropped` captions."""
        return {extra.argument: extra.of_batch(batch, dropped) for extra in self.extras}

    def caption_columns(self, captions: Sequence[str]) -> dict[str, NDArray]:
        """The columns of training batches that extras make of captions."""
        return {n: a for extra in self.extras for n, a in extra.columns(captions).items()}

    def join(self, outputs: Sequence[TextEncoderOutput]) -> dict[str, Array]:
        """The outputs of all text encoders as conditioning of the network."""
        joined: dict[str, Array] = {}
        if outputs:
            axis = -1 if self.joined_as == "features" else -2
            states = [each.hidden_states for each in outputs]
            joined[self.states_argument] = jnp.concatenate(states, axis=axis)
        for spec, output in zip(self.text_encoders, outputs, strict=True):
            if output.pooled is not None:
                joined.setdefault(self.pooled_argument, output.pooled)
            if spec.mask is not None and output.mask is not None:
                joined[spec.mask] = output.mask
        return joined


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
