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
from jaxdiff.training.objectives import Learner, Metrics, Params
from jaxdiff.training.objectives.diffusion import draw_times, encoded
from jaxdiff.training.per_sample_random import (
    per_sample_normal,
    per_sample_split,
    per_sample_uniform,
)


class Frozen(NamedTuple):
    """Weights of what makes latents, conditions and answers, and the empty caption's ids."""

    vae: Params
    text_encoder: Params
    teacher: Params
    null: Int[Array, "n"]


def student(teacher: UNet2DConditionModel, width: int, remat: str = "none") -> UNet2DConditionModel:
    """The teacher's network, as shapes, with an embedded scale of this width as an input.

    `remat` says what is computed again for gradients: a name in REMAT.
    """
    config = dataclasses.replace(teacher.config, time_cond_proj_dim=width)
    return abstract(UNet2DConditionModel, config, dtype=teacher.dtype, remat=remat)


def distillation_learner(
    config: DistillationObjective,
    teacher: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    schedule: NoiseSchedule,
) -> Learner:
    """The student's learner (2210.03142, algorithm 1), beginning with the teacher's weights.

    `teacher`, `vae` and `text_encoder` are modules that its `Frozen` weights belong to. The
    teacher's answer is uncond + w (cond - uncond), w drawn for each picture; the error is of the
    network's own kind of output. Batches have `image` (b, h, w, 3) in [-1, 1] and `ids` (b, n).
    """
    learnt = student(teacher, config.guidance_embedding_dim, config.remat)

    def answer(
        frozen: Frozen, x: Array, t: Array, states: Array, null: Array, w: Float[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        """The teacher's guided output, both streams in one call."""
        twice = with_params(teacher, frozen.teacher)(
            jnp.concatenate([x, x]), jnp.concatenate([t, t]), jnp.concatenate([null, states])
        )
        uncond, cond = jnp.split(twice, 2)
        return uncond + w[:, None, None, None] * (cond - uncond)

    def loss(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        latent_key, scale_key, time_key, noise_key = per_sample_split(key, len(batch["image"]), 4)
        x0 = encoded(with_params(vae, frozen.vae), batch["image"], latent_key)
        read = with_params(text_encoder, frozen.text_encoder)
        states = read(batch["ids"])
        null = jnp.broadcast_to(read(frozen.null[None]), states.shape)
        t = draw_times(
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
        wanted = jax.lax.stop_gradient(answer(frozen, x, t, states, null, w))
        told = guidance_embedding(w, config.guidance_embedding_dim)
        output = with_params(learnt, params)(x, t, states, timestep_cond=told)
        error = mse(output, wanted, jnp.ones(len(x0)))
        return error, {"relative_error": error / jnp.mean(jnp.square(wanted))}

    return Learner(param_dict(learnt), _begin_with(teacher, learnt), loss, rules=UNET)


def _begin_with(
    teacher: UNet2DConditionModel, learnt: UNet2DConditionModel
) -> Callable[[int], Iterator[tuple[str, NDArray]]]:
    """The teacher's weights; what it lacks as in a new network, which does not heed the scale.

    A teacher that is shapes alone lacks everything.
    """
    table = param_dict(teacher)
    known = {n: a for n, a in table.items() if not isinstance(a, jax.ShapeDtypeStruct)}

    def init(seed: int) -> Iterator[tuple[str, NDArray]]:
        for path, array in initial_weights(learnt, seed):
            yield path, np.asarray(known.get(path, array), np.float32)

    return init
