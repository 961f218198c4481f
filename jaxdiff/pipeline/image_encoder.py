"""Embeddings of given images by the image encoder of a prior, to mix, to vary, or to guide from."""

import numpy as np

from jaxdiff.core.types import Float, NDArray
from jaxdiff.data.image_arrays import ImageInput, image_list
from jaxdiff.pipeline.pipeline import Pipeline


def image_embeddings(prior: Pipeline, images: ImageInput) -> Float[NDArray, "b d"]:
    """CLIP's embeddings of images (PIL, uint8, or files), as the prior generates them of texts.

    InputError for what is no image, and for a model without an image encoder.
    """
    return prior.image_embedder(image_list(images, "image", 3))


def zero_image_embedding(prior: Pipeline) -> Float[NDArray, "1 d"]:
    """What the prior's image encoder makes of pixels of zero; InputError if it has none."""
    config = prior.image_embedder.encoder.config
    side = config.image_size
    return prior.image_embedder.embed(np.zeros((1, side, side, config.num_channels), np.float32))
