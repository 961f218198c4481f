"""Guidance distillation: a network learns its own guided output, with the scale as an input."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Float, Int, Key, NDArray
from jaxdiff.diffusion.losses import add_noise, mse
from jaxdiff.diffusion.schedules import NoiseSchedule
from jaxdiff.models.build import abstract, initial_weights, param_dict, with_params
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.nn.embeddings import guidance_embedding
from jaxdiff.parallel.sharding import UNET
from jaxdiff.training.config import DistillationObjective
from jaxdiff.training.objectives import Metrics, Params, TrainingTask
from jaxdiff.training.objectives.diffusion import encode_latents, sample_timesteps
from jaxdiff.training.per_sample_random import (
    per_sample_normal,
    per_sample_split,
    per_sample_uniform,
)


class Frozen(NamedTuple):
    """The weights of VAE, text encoder and teacher, and the token ids of the null caption."""

    vae: Params
    text_encoder: Params
    teacher: Params
    null: Int[Array, "n"]


def student_network(
    teacher: UNet2DConditionModel, width: int, remat: str = "none"
) -> UNet2DConditionModel:
    """The teacher's network, as shapes, with an embedding of the guidance scale as an input.

    `width` is that of the embedding; `remat` is one of REMAT.
    """
    config = dataclasses.replace(teacher.config, time_cond_proj_dim=width)
    return abstract(UNet2DConditionModel, config, dtype=teacher.dtype, remat=remat)


def distillation_task(
    config: DistillationObjective,
    teacher: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    schedule: NoiseSchedule,
) -> TrainingTask:
    """The student's task (2210.03142, algorithm 1); it starts from the teacher's weights.

    `teacher`, `vae` and `text_encoder` are modules that its `Frozen` weights belong to. The
    teacher's output is uncond + w (cond - uncond), with w sampled for each image; the error is in
    the space of the network's output. Batches have `image` (b, h, w, 3) in [-1, 1] and `ids`
    (b, n).
    """
    student = student_network(teacher, config.guidance_embedding_dim, config.remat)

    def teacher_output(
        frozen: Frozen, x: Array, t: Array, states: Array, null: Array, w: Float[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        """The teacher's guided output, both streams in one call."""
        both = with_params(teacher, frozen.teacher)(
            jnp.concatenate([x, x]), jnp.concatenate([t, t]), jnp.concatenate([null, states])
        )
        uncond, cond = jnp.split(both, 2)
        return uncond + w[:, None, None, None] * (cond - uncond)

    def loss(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        latent_key, scale_key, time_key, noise_key = per_sample_split(key, len(batch["image"]), 4)
        x0 = encode_latents(with_params(vae, frozen.vae), batch["image"], latent_key)
        encode = with_params(text_encoder, frozen.text_encoder)
        states = encode(batch["ids"])
        null = jnp.broadcast_to(encode(frozen.null[None]), states.shape)
        t = sample_timesteps(
            time_key,
            (len(x0),),
            schedule.num_timesteps,
            config.timestep_sampling,
            config.timestep_shift,
        )
        low, high = config.guidance_scale_range
        w = per_sample_uniform(scale_key, (len(x0),), low, high)
        alpha, sigma = schedule.alpha_sigma(t)
        x = add_noise(x0, per_sample_normal(noise_key, x0.shape, x0.dtype), alpha, sigma)
        target = jax.lax.stop_gradient(teacher_output(frozen, x, t, states, null, w))
        scale_embedding = guidance_embedding(w, config.guidance_embedding_dim)
        output = with_params(student, params)(x, t, states, timestep_cond=scale_embedding)
        error = mse(output, target, jnp.ones(len(x0)))
        return error, {"relative_error": error / jnp.mean(jnp.square(target))}

    return TrainingTask(param_dict(student), _init_from_teacher(teacher, student), loss, rules=UNET)


def _init_from_teacher(
    teacher: UNet2DConditionModel, student: UNet2DConditionModel
) -> Callable[[int], Iterator[tuple[str, NDArray]]]:
    """The teacher's weights; new ones as in a new network, which ignores the scale.

    For an abstract teacher all are new.
    """
    table = param_dict(teacher)
    teacher_arrays = {n: a for n, a in table.items() if not isinstance(a, jax.ShapeDtypeStruct)}

    def init(seed: int) -> Iterator[tuple[str, NDArray]]:
        for path, array in initial_weights(student, seed):
            yield path, np.asarray(teacher_arrays.get(path, array), np.float32)

    return init
