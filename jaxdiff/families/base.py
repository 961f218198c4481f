"""A family of models: which networks it has, and how their conditioning is made.

A family is data, and a file in this folder: the component that denoises and its adapter, the text
encoders with what each of them gives and how that is joined, and the extras, which are inputs of
the network beside the text. An extra declares the options of a request that it reads, checks them,
and makes its entry of the network's conditioning, for requests and for training batches.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.types import Array, Bool, Float, Int, NDArray
from jaxdiff.core.validate import in_range
from jaxdiff.data.texts import ID_COLUMNS, STATE_COLUMNS
from jaxdiff.models.clip import CLIPTextModel, TextFeatures


class Option(NamedTuple):
    """An option of a request that an extra reads: its type, default, and range of its numbers."""

    annotation: Any
    default: Any
    low: float
    high: float

    def check(self, name: str, value: Any) -> None:
        """InputError for a number beyond the range."""
        for number in np.ravel(() if value is None else value):
            in_range(name, number.item(), self.low, self.high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtraInputs:
    """What a batch of b images with K streams each has for extras."""

    size: tuple[int, int]  # height and width in pixels
    options: Mapping[str, Any]  # of the request, where they are not the defaults
    prompted: tuple[bool, ...]  # which of the K streams get the prompt
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
    untrainable: ClassVar[str | None] = None  # why no model that has it can be trained

    def check(self, settings: Mapping[str, Any]) -> None:
        """InputError for settings of a request that the model does not work with."""
        del settings

    @abstractmethod
    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k *d"]:
        """The values of each stream of each image."""

    @abstractmethod
    def of_batch(self, batch: Mapping[str, Array]) -> Float[Array, "b *d"]:
        """The values of each image of a training batch."""


class TextEncoderOutput(NamedTuple):
    """What one text encoder gives the network; leading axes b, or b and k."""

    hidden_states: Float[Array, "*b n d"]
    pooled: Float[Array, "*b p"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder of a family, and which of its outputs the network gets."""

    component: str = "text_encoder"
    tokenizer: str = "tokenizer"
    layer: str = "last"  # "last" hidden states, after the final norm, or "penultimate" without it
    pooled: bool = False  # whether the network gets the pooled embedding of this encoder

    def select(self, features: TextFeatures) -> TextEncoderOutput:
        """The outputs that the network gets."""
        states = features.last if self.layer == "last" else features.penultimate
        return TextEncoderOutput(states, features.pooled if self.pooled else None)

    def encode(self, encoder: CLIPTextModel, ids: Int[Array, "b n"]) -> TextEncoderOutput:
        """Encode the token ids of texts."""
        return self.select(encoder.features(ids))

    def unused_parameters(self, encoder: CLIPTextModel) -> tuple[str, ...]:
        """Path prefixes of an encoder's weights that its outputs do not depend on."""
        if self.pooled:
            return ()
        if self.layer == "last":
            return ("text_projection.",)
        end = encoder.config.num_hidden_layers - 1
        names = (f"encoder.layers.{end}.", "final_layer_norm.")
        return ("text_projection.", *(f"text_model.{name}" for name in names))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models."""

    name: str
    network: str  # the component that denoises
    network_class: type[nnx.Module]
    adapter: Callable[..., Any]  # (module, prediction type) -> its adapter
    latent_codec: str = "vae"  # the component
    text_encoders: tuple[TextEncoder, ...] = (TextEncoder(),)
    # how the hidden states of several encoders become one context: side by side as "features", or
    # one after the other as "tokens"
    joined_as: str = "features"
    states_argument: str = "context"  # the network's argument for hidden states
    pooled_argument: str = "text_embeds"  # for the pooled embedding
    zero_uncond: bool = False  # a negative prompt that was not given is zeros, not the empty text
    extras: tuple[Extra, ...] = ()

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

    @property
    def has_pooled(self) -> bool:
        """Whether the network takes a pooled embedding."""
        return any(encoder.pooled for encoder in self.text_encoders)

    @property
    def options(self) -> dict[str, Option]:
        """The options of a request that the extras read."""
        return {name: option for extra in self.extras for name, option in extra.options.items()}

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of other options."""
        return {name: value for extra in self.extras for name, value in extra.defaults.items()}

    @property
    def uses_mask(self) -> bool:
        """Whether the network takes a mask and a masked image, as inpainting models do."""
        return any(extra.uses_mask for extra in self.extras)

    def request_conditioning(self, inputs: ExtraInputs) -> dict[str, NDArray]:
        """The conditioning beside the text for a batch of requests."""
        return {extra.argument: extra.of_request(inputs) for extra in self.extras}

    def batch_conditioning(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The conditioning beside the text for a training batch."""
        return {extra.argument: extra.of_batch(batch) for extra in self.extras}

    def join(self, outputs: Sequence[TextEncoderOutput]) -> dict[str, Array]:
        """The outputs of all text encoders as conditioning of the network."""
        axis = -1 if self.joined_as == "features" else -2
        states = jnp.concatenate([each.hidden_states for each in outputs], axis=axis)
        pooled = [each.pooled for each in outputs if each.pooled is not None]
        return {self.states_argument: states} | (
            {self.pooled_argument: pooled[0]} if pooled else {}
        )


def select_rows(
    condition: Bool[Array, "*b"], first: TextEncoderOutput, second: TextEncoderOutput
) -> TextEncoderOutput:
    """For each text `first` where `condition` is true, else `second`."""
    hidden_states = jnp.where(condition[..., None, None], first.hidden_states, second.hidden_states)
    if first.pooled is None or second.pooled is None:
        return TextEncoderOutput(hidden_states)
    return TextEncoderOutput(
        hidden_states, jnp.where(condition[..., None], first.pooled, second.pooled)
    )


def zero_rows(condition: Bool[Array, "*b"], output: TextEncoderOutput) -> TextEncoderOutput:
    """`output` with zeros for the texts where `condition` is true."""
    return select_rows(condition, jax.tree.map(jnp.zeros_like, output), output)
