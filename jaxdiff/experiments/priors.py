"""What trainings of priors, which generate embeddings of images, measure of data and results."""

from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.pipelines import IMAGE_ENCODER
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, NDArray
from jaxdiff.experiments.base_model import BaseModel
from jaxdiff.experiments.evaluation import Generate, in_batches
from jaxdiff.experiments.experiment import training_batches
from jaxdiff.experiments.image_encoder import ImageEncoder
from jaxdiff.models.build import with_params
from jaxdiff.training.config import DiffusionObjective, TrainConfig
from jaxdiff.training.objectives.diffusion import (
    InitialWeights,
    ParameterPartition,
)

NUM_MEASURED = 4096  # images behind the mean and the deviation of embeddings


def check_evaluation(objective: DiffusionObjective) -> None:
    """InputError for evaluation of images, of which a prior generates none."""
    for name in ("num_eval_images", "eval_clip"):
        if given := getattr(objective, name):
            raise InputError(
                f"objective.{name}: got {given} for a prior, expected it left out: it generates "
                "embeddings, no images"
            )


def with_statistics(
    partition: ParameterPartition, base: BaseModel, config: TrainConfig
) -> ParameterPartition:
    """`partition`, whose initial weights have the statistics of the embeddings of the data.

    They are the mean and the deviation of each element over NUM_MEASURED images.
    """

    def init(seed: int) -> InitialWeights:
        mean, std = _statistics(base, config)
        found = {"clip_mean": mean[None], "clip_std": std[None]}
        for path, array in partition.init(seed):
            yield path, found.get(path.rpartition(".")[2], array)

    return partition._replace(init=init)


def _statistics(
    base: BaseModel, config: TrainConfig
) -> tuple[Float[NDArray, "d"], Float[NDArray, "d"]]:
    encoder = cast(ImageEncoder, base.image_encoder)
    processor, table = encoder.processor, base.read_weights(IMAGE_ENCODER, jnp.float32)

    @jax.jit
    def embed(images: Array) -> Array:
        return with_params(encoder.module, table)(processor(images)).pooled

    stream, rows = training_batches(config, process_count=1), []
    while sum(map(len, rows)) < NUM_MEASURED:
        rows.append(np.asarray(embed(next(stream)["image"]), np.float64))
    stream.close()
    embeddings = np.concatenate(rows)
    return embeddings.mean(0).astype(np.float32), embeddings.std(0).astype(np.float32)


def embedding_cosine(generate: Generate, embed: Generate, inputs: Mapping[str, NDArray]) -> float:
    """The mean cosine between embeddings that are generated of captions and those of their images.

    `embed` makes the latter; `inputs` are those of the sampler, with the images.
    """
    made, real = in_batches(generate, inputs), in_batches(embed, inputs)
    lengths = np.linalg.norm(made, axis=1) * np.linalg.norm(real, axis=1)
    return float(np.mean(np.sum(made * real, axis=1) / lengths))
