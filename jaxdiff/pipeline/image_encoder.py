"""Embeddings of given images by the image encoder of a prior, to mix, to vary, or to guide from."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.clip_vision import image_processor_of
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, NDArray, PyTree
from jaxdiff.data.image_arrays import ImageInput, image_list, to_pil
from jaxdiff.families.image_embeddings import IMAGE_ENCODER
from jaxdiff.models.clip import CLIPVisionModel
from jaxdiff.pipeline.pipeline import Pipeline


def image_embeddings(prior: Pipeline, images: ImageInput) -> Float[NDArray, "b d"]:
    """CLIP's embeddings of images (PIL, uint8, or files), as the prior generates them of texts.

    InputError for what is no image, and for a model without an image encoder.
    """
    encoder = _encoder(prior)
    rows = [to_pil(item, "RGB") for item in image_list(images, "image", 3)]
    name, config = next(iter(prior.parts.image_processors.items()), ("", {}))
    size = encoder.config.image_size
    processor = image_processor_of(config, size, source=f"{prior.name}: {name}")
    return _embeddings(prior, processor.preprocess(rows))


def zero_image_embedding(prior: Pipeline) -> Float[NDArray, "1 d"]:
    """What the prior's image encoder makes of pixels of zero; InputError if it has none."""
    config = _encoder(prior).config
    side = config.image_size
    return _embeddings(prior, np.zeros((1, side, side, config.num_channels), np.float32))


def _encoder(prior: Pipeline) -> CLIPVisionModel:
    part = prior.parts.components.get(IMAGE_ENCODER)
    if part is None or not isinstance(part.module, CLIPVisionModel):
        raise InputError(
            f"{prior.name}: got no {IMAGE_ENCODER}, expected it: it makes the embeddings of "
            "images, and that which guidance has without a negative prompt"
        )
    return part.module


def _embeddings(prior: Pipeline, pixels: Float[NDArray, "b h w c"]) -> Float[NDArray, "b d"]:
    stages, count = prior.stages, len(pixels)
    graph, weights = stages.layout.split(_encoder(prior))
    padded = np.minimum(np.arange(-(-count // stages.num_shards) * stages.num_shards), count - 1)
    program = stages.program(_embed, ".b", encoder=graph)
    return stages.gather(program(weights, stages.shard(pixels[padded])))[:count]


def _embed(
    weights: PyTree, pixels: Float[Array, "b h w c"], *, encoder: Any
) -> Float[Array, "b d"]:
    return encoder(weights)(pixels).pooled.astype(jnp.float32)
