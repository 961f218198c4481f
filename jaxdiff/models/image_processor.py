"""The image preprocessing of CLIP."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, NDArray, UInt8


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPImageProcessor:
    """Resize to one size, then normalise by the mean and the deviation of each channel.

    InputError if `shortest_edge` is below `size`, from which nothing could be cut.
    """

    size: int  # sides of the results in pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # of `preprocess`: the shorter side becomes so long, and the centre is cut out; None: `size`
    shortest_edge: int | None = None
    crops: bool = True  # of `preprocess`; False: both sides become `size`, whatever the shape

    def __post_init__(self) -> None:
        """Refuse sides that are too short."""
        if self.shortest_edge is not None and self.shortest_edge < self.size:
            raise InputError(
                f"shortest_edge: got {self.shortest_edge}, expected at least the size, {self.size}"
            )

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b s s 3"]:
        """Images in [-1, 1] on a device, both sides resized to `size`, and normalised.

        Of squares that is what `preprocess` gives, up to the rounding to 256 levels.
        """
        shape = (len(images), self.size, self.size, 3)
        if images.shape != shape:
            images = jax.image.resize(images, shape, "cubic")
        mean, std = (jnp.asarray(x, images.dtype) for x in (self.mean, self.std))
        return (images / 2 + 0.5 - mean[None, None, None]) / std[None, None, None]

    def preprocess(
        self, images: Sequence[Image.Image | UInt8[NDArray, "_ _ 3"]]
    ) -> Float[NDArray, "b s s 3"]:
        """RGB images as transformers' CLIPImageProcessor gives them, in float32.

        Resized by PIL's bicubic filter to 256 levels, cut, and normalised. InputError for PIL
        images of other modes.
        """
        pixels = np.stack([np.asarray(self._square(image)) for image in images])
        mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
        return (pixels.astype(np.float32) / 255 - mean) / std

    def _square(self, pixels: Image.Image | UInt8[NDArray, "_ _ 3"]) -> Image.Image:
        """The image in `size` x `size` pixels."""
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        if image.mode != "RGB":
            raise InputError(f"images: got mode {image.mode}, expected RGB")
        if not self.crops:
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        edge, short = self.shortest_edge or self.size, min(image.size)
        width, height = (edge * side // short for side in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = ((side - self.size) // 2 for side in (width, height))
        return resized.crop((left, top, left + self.size, top + self.size))
