"""Guidance distillation: a network learns its own guided output, with the scale as an input."""

import dataclasses
from collections.abc import Iterator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Float, Key, NDArray
from jaxdiff.diffusion.losses import add_noise, in_loss_units, mse
from jaxdiff.diffusion.schedules import FlowSchedule, VPSchedule
from jaxdiff.families.base import Family
from jaxdiff.families.extras import GUIDANCE_SCALE
from jaxdiff.families.stable_diffusion import GuidanceEmbedding
from jaxdiff.guidance.base import extrapolate
from jaxdiff.models.build import abstract, initial_weights
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.training.config import DistillationObjective
from jaxdiff.training.objectives.diffusion import (
    Frozen,
    LatentDiffusion,
    LoadWeights,
    Networks,
    Times,
    encode_latents,
    sample_times,
    train_denoiser,
)
from jaxdiff.training.objectives.guided_conditioning import uncond_and_cond
from jaxdiff.training.step import (
    Metrics,
    Params,
    TrainingTask,
    per_sample_normal,
    per_sample_split,
    per_sample_uniform,
)


def student_network(
    teacher: UNet2DConditionModel, width: int, remat: str = "none"
) -> UNet2DConditionModel:
    """The teacher's network, as shapes, with an embedding of the guidance scale as an input.

    `width` is that of the embedding; `remat` is one of REMAT.
    """
    config = dataclasses.replace(teacher.config, time_cond_proj_dim=width)
    return abstract(UNet2DConditionModel, config, dtype=teacher.dtype, remat=remat)


def student_model(
    config: DistillationObjective,
    family: Family,
    networks: Networks,
    prediction_type: str,
    *,
    pretrained: LoadWeights = dict,
) -> LatentDiffusion:
    """The model with the student as its UNet, for family and `networks` of the teacher's model.

    Its weights are initially those of the `pretrained` UNet; new ones as in a new network, which
    ignores the scale.
    """
    own, width = family.network, config.guidance_embedding_dim
    teacher = cast(UNet2DConditionModel, networks[own])
    student = student_network(teacher, width, config.remat)
    family = dataclasses.replace(family, extras=(*family.extras, GuidanceEmbedding(width)))

    def init(seed: int) -> Iterator[tuple[str, NDArray]]:
        table = pretrained().get(own, {})
        for path, array in initial_weights(student, seed):
            yield path, np.asarray(table.get(path, array), np.float32)

    partition = train_denoiser(family, {**networks, own: student})
    return LatentDiffusion(partition._replace(init=init), prediction_type)


def distillation_task(
    config: DistillationObjective,
    teacher: LatentDiffusion,
    student: LatentDiffusion,
    schedule: VPSchedule | FlowSchedule,
) -> TrainingTask:
    """The student's task (2210.03142, algorithm 1).

    The teacher's weights are the frozen ones of the UNet. Its output is
    uncond + w (cond - uncond), with w sampled for each image; the error is in the space of the
    network's output. Batches have `image` (b, h, w, 3) in [-1, 1] and `ids` (b, n), with a second
    text encoder `ids_2`, and may have `time_ids` (b, 6).
    """
    family, partition = student.family, student.partition

    def teacher_output(
        frozen: Frozen,
        x: Float[Array, "b h w c"],
        t: Times,
        streams: tuple[dict[str, Array], dict[str, Array]],
        w: Float[Array, "b"],
    ) -> Float[Array, "b h w c"]:
        """The teacher's guided output, both streams in one call."""
        cond = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *streams)
        twice = jnp.concatenate([x, x]), jnp.concatenate([t, t])
        both = teacher.network(frozen.weights[family.network], *twice, cond)
        return extrapolate(both[: len(x)], both[len(x) :], w)

    def loss(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        latent_key, scale_key, time_key, noise_key = per_sample_split(key, len(batch["image"]), 4)
        tables = student.merge_weights(params, frozen)
        encoders = student.build_encoders(tables)
        x0 = encode_latents(family.codec(encoders), batch["image"], latent_key)
        t = sample_times(time_key, (len(x0),), schedule, config)
        low, high = config.guidance_scale_range
        w = per_sample_uniform(scale_key, (len(x0),), low, high)
        alpha, sigma = schedule.alpha_sigma(t)
        x = add_noise(x0, per_sample_normal(noise_key, x0.shape, x0.dtype), alpha, sigma)
        streams = uncond_and_cond(teacher, encoders, frozen.null, batch)
        target = jax.lax.stop_gradient(teacher_output(frozen, x, t, streams, w))
        none = jnp.full(len(x0), False)
        cond = streams[1] | family.batch_conditioning({**batch, GUIDANCE_SCALE: w}, none)
        output = student.network(tables[family.network], x, t, cond)
        output, target = (
            in_loss_units(student.network.prediction_type, each, sigma) for each in (output, target)
        )
        error = mse(output, target, jnp.ones(len(x0)))
        return error, {"relative_error": error / jnp.mean(jnp.square(target))}

    return TrainingTask(partition.shapes, partition.init, loss, rules=partition.rules)
