"""Classification of noisy latents, for classifier guidance (2105.05233, section 4)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Dtype, Float, Int, Key
from jaxdiff.diffusion.losses import add_noise
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.models.build import abstract, initial_weights, param_dict, with_params
from jaxdiff.models.classifier import LatentClassifier
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.parallel.sharding import CLASSIFIER
from jaxdiff.training.config import ClassifierObjective
from jaxdiff.training.objectives.diffusion import encode_latents, sample_timesteps
from jaxdiff.training.step import Metrics, Params, TrainingTask, per_sample_normal, per_sample_split


def classifier_task(
    config: ClassifierObjective, vae: AutoencoderKL, dtype: Dtype = jnp.float32
) -> TrainingTask:
    """The classifier's task; the frozen weights are those of the (abstract) `vae`.

    Batches have `image` (b, h, w, 3) in [-1, 1], and `targets` and `known` (b, n) as
    in `models.attributes`. The loss is the negative log-likelihood of the known labels.
    """
    template = abstract(LatentClassifier, config.model, dtype=dtype)
    attributes = config.model.attributes

    def loss(
        params: Params, frozen: Params, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        latent_key, levels_key = per_sample_split(key, len(batch["image"]), 2)
        # in the order of jnp.repeat: the noise levels of an image are adjacent
        level_keys = jnp.concatenate(
            per_sample_split(levels_key, len(levels_key), config.noise_levels_per_image)
        ).reshape(config.noise_levels_per_image, -1)
        timestep_key, noise_key = per_sample_split(level_keys.T.reshape(-1), level_keys.size, 2)
        encoder = with_params(vae, frozen)
        x0 = encode_latents(encoder, batch["image"], latent_key)
        x0, targets, known = (
            jnp.repeat(array, config.noise_levels_per_image, axis=0)
            for array in (jax.lax.stop_gradient(x0), batch["targets"], batch["known"])
        )
        t = sample_timesteps(
            timestep_key,
            x0.shape[:1],
            config.schedule.num_discrete,
            config,
        )
        logits = with_params(template, params)(
            add_schedule_noise(config.schedule, x0, t, noise_key), t
        )
        nats = -jnp.mean(attributes.log_probs(logits, targets, known), axis=0)
        names = [f"nats_{group.name}" for group in attributes.groups]
        return jnp.sum(nats), dict(zip(names, nats, strict=True))

    return TrainingTask(
        param_dict(template), functools.partial(initial_weights, template), loss, rules=CLASSIFIER
    )


def add_schedule_noise(
    schedule: VPSchedule, x0: Float[Array, "b h w c"], t: Int[Array, "b"], key: Key[Array, "..."]
) -> Float[Array, "b h w c"]:
    """x_t = alpha x_0 + sigma eps at the timesteps `t`."""
    alpha, sigma = schedule.alpha_sigma(t)
    return add_noise(x0, per_sample_normal(key, x0.shape, x0.dtype), alpha, sigma)


def accuracies(
    model: LatentClassifier,
    schedule: VPSchedule,
    x0: Float[Array, "b h w c"],
    targets: Bool[Array, "b n"],
    known: Bool[Array, "b n"],
    timesteps: Sequence[int],
    key: Key[Array, ""],
) -> Float[Array, "l g"]:
    """The accuracy at each of `timesteps`, for each group of attributes.

    Over the images where the group is known; see `LabelSet.correct`.
    """

    def accuracy_at(timestep: Int[Array, ""]) -> Float[Array, "g"]:
        t = jnp.full(len(x0), timestep)
        x = add_schedule_noise(schedule, x0, t, jax.random.fold_in(key, timestep))
        right, is_known = model.config.attributes.correct(model(x, t), targets, known)
        return jnp.mean(right, axis=0, where=is_known, dtype=jnp.float32)

    return jax.lax.map(accuracy_at, jnp.asarray(timesteps))
