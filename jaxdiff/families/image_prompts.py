"""Embeddings of images as conditioning beside a text, given or made of images by CLIP."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, NDArray
from jaxdiff.core.validate import check_shape
from jaxdiff.families.extras import Extra, ExtraInputs, Option
from jaxdiff.families.image_embeddings import IMAGE_EMBEDS, ImageEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePrompt(Extra):
    """The embedding of an image in streams with prompts; others get no image.

    `reads_image_prompt` says whether the model makes embeddings of images itself.
    """

    width: int  # of embeddings
    reads_image_prompt: bool = False

    options: ClassVar[Mapping[str, Option]] = {IMAGE_EMBEDS: ImageEmbedding.options[IMAGE_EMBEDS]}
    untrainable = "got a network of texts and embeddings of images, expected one of either"

    def check(self, settings: Mapping[str, Any], texts: Sequence[str]) -> None:
        """InputError for none, for two, and for one of another width."""
        del texts
        embedding, image = settings.get(IMAGE_EMBEDS), settings.get("image_prompt")
        if embedding is None and image is None:
            if self.reads_image_prompt:
                raise InputError(f"image: got none, expected one, or its embedding, {IMAGE_EMBEDS}")
            raise InputError(f"{IMAGE_EMBEDS}: got none, expected the embedding of an image")
        if embedding is None:
            return
        if image is not None:
            raise InputError(f"image: got one with {IMAGE_EMBEDS}, expected only one of them")
        check_shape(IMAGE_EMBEDS, np.asarray(embedding), (self.width,))

    def embeddings(self, inputs: ExtraInputs) -> Float[NDArray, "b d"]:
        """That of each image of a batch of requests."""
        if inputs.image_prompts is not None and IMAGE_EMBEDS not in inputs.options[0]:
            return inputs.image_prompts()
        return np.asarray([options[IMAGE_EMBEDS] for options in inputs.options], np.float32)

    def for_prompted(
        self,
        own: Float[NDArray, "b d"],
        null: Float[NDArray, "d"],
        prompted: Sequence[bool],
    ) -> Float[NDArray, "b k d"]:
        """`own` values of images in streams with prompts, and in others `null`."""
        return np.where(np.array(prompted)[:, None], own[:, None], null).astype(np.float32)

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b d"]:
        raise NotImplementedError(self.untrainable)
