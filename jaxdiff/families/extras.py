"""Extras: inputs of a network beside the text, such as sizes, a mask or a class label.

An extra declares the options of a request that it reads, checks them, and makes its entry of the
network's conditioning, for requests and for training batches.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, get_args, get_origin

import numpy as np

from jaxdiff.core.types import Array, Bool, Float, Int, NDArray
from jaxdiff.core.validate import in_range

# Columns of training batches beside those of the data.
GUIDANCE_SCALE = "guidance_scale"  # (b,) that which each image is made with
LOW_RESOLUTION = "low_resolution"  # (b, h3, w3, 3) the images to enlarge, in [-1, 1]
LOW_RESOLUTION_NOISE = "low_resolution_noise"  # (b, h, w, 3) of unit variance, of the latents' size
LOW_RESOLUTION_LEVEL = "low_resolution_level"  # (b,) how much of it, 0 to 1


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

    def check(self, name: str, value: Any) -> Any:
        """`value` as requests have it; InputError for a number beyond the range."""
        for number in np.ravel(() if value is None else value):
            in_range(name, number.item(), self.low, self.high)
        return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtraInputs:
    """What a batch of b images with K streams each has for extras."""

    size: tuple[int, int]  # height and width in pixels
    # of the request of each image, where they are not the defaults
    options: Sequence[Mapping[str, Any]]
    prompted: tuple[bool, ...]  # which of the K streams get the prompt
    texts: Sequence[Sequence[str | None]]  # of each image, what its streams read; None: nothing
    guidance_scales: Float[NDArray, "b"]
    guidance: str = "cfg"  # guidance rule and wrappers
    image: Float[NDArray, "b h2 w2 3"] | None = None  # in [-1, 1]
    latents: Float[NDArray, "b h w c"] | None = None  # scaled, instead of the image
    mask: Float[NDArray, "b h2 w2 1"] | None = None  # 1 where the image is repainted
    low_resolution: Float[NDArray, "b h3 w3 3"] | None = None  # the image to enlarge, in [-1, 1]
    latent_size: tuple[int, ...]  # height and width of the latents, where they have them
    # a shape -> for each image standard normal noise, which is not that of its latents
    noise: Callable[[tuple[int, ...]], Float[NDArray, "b *d"]]
    # CLIP's embeddings of the images that are prompts; None: the model makes none
    image_prompts: Callable[[], Float[NDArray, "b e"]] | None = None
    # images in [-1, 1] -> scaled latents, and a mask of pixels -> of latents
    encode: Callable[[NDArray], Float[NDArray, "b h w c"]]
    downsample: Callable[[NDArray], Float[NDArray, "b h w 1"]]

    def image_latents(self) -> Float[NDArray, "b h w c"] | None:
        """The latents of the images, encoded unless they are given; None without images."""
        return self.latents if self.image is None else self.encode(self.image)

    def for_streams(
        self, array: Float[NDArray, "b *d"] | Int[NDArray, "b *d"]
    ) -> Float[NDArray, "b k *d"] | Int[NDArray, "b k *d"]:
        """One value per image for all of its streams."""
        return np.repeat(array[:, None], len(self.prompted), axis=1)


class Extra(ABC):
    """An input of the network beside the text."""

    argument: ClassVar[str]  # of the network's adapter
    options: ClassVar[Mapping[str, Option]] = {}  # of a request
    defaults: ClassVar[Mapping[str, Any]] = {}  # of other options, for models that have the extra
    uses_guidance_scale: ClassVar[bool] = False  # the network takes that of the request
    uses_mask: ClassVar[bool] = False  # the network sees the mask: known latents are not put back
    uses_image: ClassVar[bool] = False  # the network sees the image: strength 1 is the default
    enlarges: ClassVar[bool] = False  # the network sees an image that it enlarges
    reads_image_prompt: bool = False  # `ExtraInputs.image_prompts`
    reads_prompt: ClassVar[bool] = False  # `ExtraInputs.texts`, as text encoders do
    untrainable: ClassVar[str | None] = None  # why no model that has it can be trained

    def check(self, settings: Mapping[str, Any], texts: Sequence[str]) -> None:
        """InputError for a request that the model does not work with.

        `settings` are its guidance rule, image, image_prompt, mask, strength, denoising_start, and
        options of extras, `texts` its prompts and, last, its negative prompt.
        """
        del settings, texts

    def columns(self, captions: Sequence[str]) -> dict[str, NDArray]:
        """Columns of training batches that are made of captions."""
        del captions
        return {}

    @abstractmethod
    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k *d"] | None:
        """The values of each stream of each image; None: the network gets none."""

    @abstractmethod
    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b *d"] | None:
        """The values of each image of a training batch; `dropped` captions count as none.

        None: the network gets none.
        """
