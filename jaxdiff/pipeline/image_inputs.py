"""Images, masks, latents and noise that a call begins with: by request, and as arrays."""

import dataclasses
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray
from jaxdiff.core.validate import check_shape
from jaxdiff.data.image_arrays import (
    ImageInput,
    are_latents,
    file_errors,
    image_array,
    image_list,
    image_size,
    low_resolution_array,
    low_resolution_list,
    mask_array,
)
from jaxdiff.families.base import Family
from jaxdiff.families.options import varies_image
from jaxdiff.pipeline.request import Request, Requests

STRENGTH = 0.8  # default for an initial image, as in diffusers; 1 with a mask


class InitialImages(NamedTuple):
    """What the images of a batch begin with; None: it is not given."""

    images: Float[NDArray, "b h2 w2 3"] | None = None  # in [-1, 1]
    latents: Float[NDArray, "b h w c"] | None = None  # scaled, instead of images
    masks: Float[NDArray, "b h2 w2 1"] | None = None  # 1 where the image is repainted
    noise: Float[NDArray, "b h w c"] | None = None  # of unit variance, instead of the seeds'
    low_resolution: Float[NDArray, "b h3 w3 3"] | None = None  # to be enlarged, in [-1, 1]


class CallImages(NamedTuple):
    """The images of a call by what they are for."""

    image: ImageInput = None  # to begin with
    low_resolution: ImageInput = None  # to enlarge
    image_prompt: ImageInput = None  # whose embedding the network gets


def own_images(family: Family, image: ImageInput, original_image: ImageInput) -> CallImages:
    """What the images of a call are for; InputError for one of no use."""
    if family.embeddings is not None:
        raise InputError(f"image: got one for {family.name}, which makes embeddings, expected none")
    if family.enlarges:
        return CallImages(original_image, low_resolution=image)
    if varies_image(family):
        return CallImages(original_image, image_prompt=image)
    if original_image is not None:
        raise InputError(f"original_image: got it for {family.name}, expected it as the image")
    return CallImages(image)


def by_request(
    images: CallImages, mask: ImageInput, latent_channels: int
) -> dict[str, list[ImageInput]]:
    """The images and the mask of each request, where there are any; one entry serves all.

    A floating-point image with `latent_channels` channels is latents; one to enlarge has values in
    [-1, 1]. InputError for what is no image and for files that are none.
    """
    columns, image = {}, images.image
    if images.low_resolution is not None:
        columns["low_resolution"] = low_resolution_list(images.low_resolution)
    if images.image_prompt is not None:
        columns["image_prompt"] = image_list(images.image_prompt, "image", 3)
    if are_latents(image, latent_channels):
        rows = np.asarray(image, np.float32)
        if not np.isfinite(rows).all():
            raise InputError("image: got latents that are not finite, expected numbers")
        columns["image"] = list(rows.reshape(-1, *rows.shape[-3:]))
    elif image is not None:
        columns["image"] = image_list(image, "image", 3)
    if mask is not None:
        columns["mask"] = image_list(mask, "mask", None)
    for name, items in columns.items():
        if not items:
            raise InputError(f"{name}: got an empty list, expected an image")
        for path in {item for item in items if isinstance(item, pathlib.Path)}:
            with file_errors(name, path), Image.open(path) as opened:
                opened.verify()
    return columns


def with_image_defaults(
    options: Mapping[str, Any],
    images: Mapping[str, Sequence[ImageInput]],
    family: Family,
    downscale: int,
) -> dict[str, Any]:
    """`options` with the defaults for size and strength that initial images bring with them.

    `downscale` is how many pixels wide a latent is. The strength is STRENGTH, but 1 with a mask and
    for networks that see the image. The latents of networks that enlarge images have their size.
    """
    multiple = downscale * family.latent_multiple
    given = {name: value for name, value in options.items() if value is not None}
    if "low_resolution" in images and downscale > 1 and "image" not in images:
        size = image_size(images["low_resolution"][0], 1)
        sides = {name: downscale * n for name, n in zip(("height", "width"), size, strict=True)}
        unset = {name: side for name, side in sides.items() if name not in given}
        return {**_nearest_sides(unset, multiple), **given}
    if "image" not in images:
        return given
    sides = dict(zip(("height", "width"), image_size(images["image"][0], downscale), strict=True))
    unset = {name: side for name, side in sides.items() if name not in given}
    defaults: dict[str, Any] = {**_nearest_sides(unset, multiple)}
    if "denoising_start" not in given:
        seen = "mask" in images or family.uses_image
        defaults["strength"] = 1.0 if seen else STRENGTH
        if isinstance(chosen := given.get("strength"), list | tuple):
            filled = [defaults["strength"] if value is None else value for value in chosen]
            given["strength"] = filled
    return defaults | given


def _nearest_sides(sides: Mapping[str, int], multiple: int) -> dict[str, int]:
    """The nearest sides that are multiples; warns where an image is resized to them."""
    nearest = {name: max(round(n / multiple), 1) * multiple for name, n in sides.items()}
    if nearest != sides:
        changes = [f"{name} {n} to {nearest[name]}" for name, n in sides.items()]
        warnings.warn(
            f"image: resized from {', '.join(changes)}, multiples of {multiple}", stacklevel=2
        )
    return nearest


def with_noise(requests: Requests, noise: Any, latent_shape: tuple[int, ...]) -> Requests:
    """Requests with unit-variance noise of their own; InputError for another shape, or NaN."""
    rows = np.asarray(check_shape("latents", noise, (len(requests), *latent_shape)), np.float32)
    if not np.isfinite(rows).all():
        raise InputError("latents: got numbers that are not finite, expected noise")
    pairs = zip(requests, rows, strict=True)
    return Requests(dataclasses.replace(request, noise=row) for request, row in pairs)


def initial_images(requests: Sequence[Request], latent_shape: tuple[int, ...]) -> InitialImages:
    """The arrays of requests with one batch key; InputError for images that do not fit."""
    first, height, width = requests[0], requests[0].height, requests[0].width
    images = latents = masks = noise = low_resolution = None
    if first.begins_with_latents:
        rows = np.stack([request.image for request in requests])
        latents = check_shape("image", rows, (None, *latent_shape))
    elif first.image is not None:
        images = image_array([request.image for request in requests], height, width)
    if first.mask is not None:
        masks = mask_array([request.mask for request in requests], height, width)
    if first.noise is not None:
        noise = np.stack([np.asarray(request.noise) for request in requests])
    if first.low_resolution is not None:
        low_resolution = low_resolution_array([each.low_resolution for each in requests])
    return InitialImages(images, latents, masks, noise, low_resolution)


def downsample_mask(
    masks: Float[NDArray, "b h w 1"], downscale: int
) -> Float[NDArray, "b h2 w2 1"]:
    """Masks for latents: the first pixel of every block, as nearest-neighbour resizing takes it."""
    return masks[:, ::downscale, ::downscale]


def enlarge(
    latents: Float[NDArray, "b h w c"], height: int, width: int
) -> Float[NDArray, "b h2 w2 c"]:
    """Latents at another size, bilinear, for a second pass at high resolution."""
    rows: Sequence[NDArray] = [
        np.stack(
            [
                np.asarray(
                    Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR)
                )
                for channel in np.moveaxis(image, -1, 0)
            ],
            axis=-1,
        )
        for image in latents.astype(np.float32)
    ]
    return np.stack(rows)
