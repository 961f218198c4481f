"""CLIP's embeddings of images, by the image encoder among the components of a model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.clip_vision import image_processor_of
from jaxdiff.checkpoints.pipelines import IMAGE_ENCODER, PipelineComponents
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, NDArray, PyTree
from jaxdiff.data.image_arrays import to_pil
from jaxdiff.models.clip import CLIPVisionModel
from jaxdiff.pipeline.compiled_model import CompiledModel
from jaxdiff.pipeline.request import Request


@dataclasses.dataclass(frozen=True)
class ImageEmbedder:
    """The image encoder of a model, which runs compiled where the model's networks do."""

    parts: PipelineComponents
    stages: CompiledModel
    name: str  # of the model, for errors

    @property
    def encoder(self) -> CLIPVisionModel:
        """The image encoder; InputError if the model has none."""
        part = self.parts.components.get(IMAGE_ENCODER)
        if part is None or not isinstance(part.module, CLIPVisionModel):
            raise InputError(
                f"{self.name}: got no {IMAGE_ENCODER}, expected it: it makes the embeddings of "
                "images, and that which guidance has without a negative prompt"
            )
        return part.module

    def __call__(self, images: Sequence[Any]) -> Float[NDArray, "b d"]:
        """The embeddings of images (PIL, uint8, or paths); InputError for what is none."""
        size = self.encoder.config.image_size
        rows = [to_pil(item, "RGB") for item in images]
        name, config = next(iter(self.parts.image_processors.items()), ("", {}))
        processor = image_processor_of(config, size, source=f"{self.name}: {name}")
        return self.embed(processor.preprocess(rows))

    def of_requests(self, requests: Sequence[Request]) -> Float[NDArray, "b d"]:
        """The embedding of the image that each request is prompted with."""
        return self([request.image_prompt for request in requests])

    def embed(self, pixels: Float[NDArray, "b h w c"]) -> Float[NDArray, "b d"]:
        """The embeddings of images that are resized and normalised as the encoder expects."""
        stages, count = self.stages, len(pixels)
        graph, weights = stages.layout.split(self.encoder)
        shards = stages.num_shards
        padded = np.minimum(np.arange(-(-count // shards) * shards), count - 1)
        program = stages.program(_embed, ".b", encoder=graph)
        return stages.gather(program(weights, stages.shard(pixels[padded])))[:count]


def _embed(
    weights: PyTree, pixels: Float[Array, "b h w c"], *, encoder: Any
) -> Float[Array, "b d"]:
    return encoder(weights)(pixels).pooled.astype(jnp.float32)
