"""A low-resolution image as an input of the network, as the later stages of cascades have it.

Noise is added to the image and the network is told how much: noise conditioning augmentation
(2106.15282, section 4; Imagen, 2205.11487, section 2.4).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.schedulers import vp_schedule
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, Int, NDArray
from jaxdiff.core.validate import in_range
from jaxdiff.diffusion.losses import add_noise
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.families.base import Family
from jaxdiff.families.extras import (
    LOW_RESOLUTION,
    LOW_RESOLUTION_LEVEL,
    LOW_RESOLUTION_NOISE,
    Extra,
    ExtraInputs,
    Option,
)
from jaxdiff.models.network_adapter import CHANNELS
from jaxdiff.models.unet.config import UNet2DConditionConfig

MAX_LEVEL = 1000
# Of UNets of pixels: the schedule of the noise, the step of the image by default, and the highest.
NOISING_SCHEDULER = "image_noising_scheduler"
NOISE = {"noise_level": 250, "highest": 999}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisedImage:
    """How noisy the image is: `schedule` at the step `noise_level`, which is at most `highest`."""

    schedule: VPSchedule
    noise_level: int  # unless a request says another
    highest: int

    options: ClassVar[Mapping[str, Option]] = {
        "noise_level": Option(int | None, None, 0, MAX_LEVEL)  # None: the model's
    }

    def levels(self, options: Sequence[Mapping[str, Any]]) -> Int[NDArray, "b"]:
        """The step of each image."""
        return np.array([each.get("noise_level", self.noise_level) for each in options], np.int32)

    def training_levels(self, batch: Mapping[str, Array]) -> Int[Array, "b"]:
        """The step of each image of a training batch, by its LOW_RESOLUTION_LEVEL."""
        steps = batch[LOW_RESOLUTION_LEVEL] * (self.highest + 1)
        return jnp.minimum(steps.astype(jnp.int32), self.highest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowResolutionImage(NoisedImage, Extra):
    """The image at the size of the latents, with noise, as further channels."""

    argument = CHANNELS
    enlarges = True

    def check(self, settings: Mapping[str, Any], texts: Sequence[str]) -> None:
        level = settings.get("noise_level")
        if level is not None:
            in_range("noise_level", level, 0, self.highest)

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k h w c"]:
        if inputs.low_resolution is None:
            raise InputError("image: got none, expected the image to enlarge")
        image = resize_bilinear(inputs.low_resolution, inputs.latent_size)
        levels = self.levels(inputs.options)
        alpha, sigma = (x[:, None, None, None] for x in self.schedule.alpha_sigma(levels))
        noisy = alpha * image + sigma * inputs.noise(image.shape[1:])
        return inputs.for_streams(noisy.astype(np.float32))

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        """The batch's LOW_RESOLUTION with LOW_RESOLUTION_NOISE."""
        noise = batch[LOW_RESOLUTION_NOISE]
        image = resize_bilinear(batch[LOW_RESOLUTION], (noise.shape[1], noise.shape[2]))
        alpha, sigma = self.schedule.alpha_sigma(self.training_levels(batch))
        return add_noise(jnp.asarray(image), noise, alpha, sigma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseLevel(NoisedImage, Extra):
    """The step of the image's noise, a class to the network."""

    argument = "class_labels"

    def of_request(self, inputs: ExtraInputs) -> Int[NDArray, "b k"]:
        return inputs.for_streams(self.levels(inputs.options))

    def of_batch(self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]) -> Int[Array, "b"]:
        """The levels of the batch."""
        return self.training_levels(batch)


def low_resolution_extras(
    schedule: VPSchedule, *, noise_level: int, highest: int
) -> tuple[Extra, ...]:
    """Those of a network that enlarges an image; see `NoisedImage`."""
    values: dict[str, Any] = {"noise_level": noise_level, "highest": highest, "schedule": schedule}
    return LowResolutionImage(**values), NoiseLevel(**values)


def pixel_stage(
    first: Family,
    enlarging: Family,
    config: UNet2DConditionConfig,
    options: Mapping[str, Any],
    source: str,
) -> Family:
    """The family of a UNet of pixels: `first`, or `enlarging` where it takes an image to enlarge.

    `options` has the config of NOISING_SCHEDULER for the latter. InputError, from `source`, for
    other channels.
    """
    more = config.concatenated_channels
    if config.channels[1] != 3 or more not in (0, 3):
        raise InputError(
            f"{source}: unet: got {config.in_channels} channels in and {config.out_channels} out, "
            "expected those of an image, and to enlarge one those of another image too"
        )
    if not more:
        return dataclasses.replace(first, latent_multiple=config.size_divisor)
    extras = low_resolution_extras(noising_schedule(options, NOISING_SCHEDULER, source), **NOISE)
    return dataclasses.replace(enlarging, latent_multiple=config.size_divisor, extras=extras)


def noising_schedule(options: Mapping[str, Any], scheduler: str, source: str) -> VPSchedule:
    """The schedule of the image's noise: the config of `scheduler` in `options`, or InputError."""
    config = options.get(scheduler)
    if not isinstance(config, Mapping):
        raise InputError(f"{source}: {scheduler}: got none, expected the schedule of its noise")
    return vp_schedule(config)


def resize_bilinear(
    images: Float[Array | NDArray, "b h w c"], size: tuple[int, ...], *, align_corners: bool = True
) -> Float[Array | NDArray, "b h2 w2 c"]:
    """Images at another size, as PyTorch does it: with corners on corners, or edges on edges."""
    for axis, length in zip((1, 2), size, strict=True):
        old = images.shape[axis]
        if old == length:
            continue
        places = np.linspace(0, old - 1, length)
        if not align_corners:
            places = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
        low = np.minimum(places.astype(int), max(old - 2, 0))
        sides = [length if i == axis else 1 for i in range(4)]
        weight = (places - low).reshape(sides).astype(np.float32)
        high = np.minimum(low + 1, old - 1)
        images = (1 - weight) * images.take(low, axis) + weight * images.take(high, axis)
    return images
