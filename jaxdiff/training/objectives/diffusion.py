"""The denoising loss of latent diffusion (2112.10752)."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.types import Array, Bool, Dtype, Float, Int, Key, NDArray
from jaxdiff.data.texts import POOLED_COLUMN, STATE_COLUMNS
from jaxdiff.diffusion.denoising import predict
from jaxdiff.diffusion.losses import add_noise, regression, snr, squared_errors
from jaxdiff.diffusion.losses import weights as loss_weights
from jaxdiff.diffusion.schedules import FlowSchedule, VPSchedule, resolution_shift
from jaxdiff.diffusion.variational_bound import bound_terms
from jaxdiff.families.base import Family, TextEncoderOutput, select_rows, zero_rows
from jaxdiff.families.extras import GUIDANCE_SCALE
from jaxdiff.families.image_embeddings import IMAGE_EMBEDS
from jaxdiff.families.text_outputs import cached_outputs
from jaxdiff.models.build import initial_weights, param_dict, with_params
from jaxdiff.models.image_processor import CLIPImageProcessor
from jaxdiff.models.latent_codec import LatentCodec
from jaxdiff.models.vae import sample_latents
from jaxdiff.parallel.sharding import ANY, Rules
from jaxdiff.training.config import DiffusionObjective, TimestepSampling
from jaxdiff.training.objectives.image_columns import columns_of_images
from jaxdiff.training.objectives.timestep_quartiles import loss_by_timestep_quartile
from jaxdiff.training.step import (
    Metrics,
    Params,
    TrainingTask,
    per_sample_normal,
    per_sample_split,
    per_sample_uniform,
)

Networks = Mapping[str, nnx.Module]  # abstract, by component: denoiser, latent codec, text encoders
Table = dict[str, Any]  # arrays, or their shapes, by path
Tables = dict[str, Table]  # by network
InitialWeights = Iterator[tuple[str, NDArray]]
LoadWeights = Callable[[], Tables]  # reads the initial weights of networks when they are needed
Times = Float[Array, "..."] | Int[Array, "..."]


class ParameterPartition(NamedTuple):
    """The weights of a model, partitioned into trained parameters and frozen weights.

    Weights are dicts by dotted path, one for each network. If the parameters are exactly the
    denoiser's, they have its paths; otherwise paths start with the network's name.
    """

    family: Family
    networks: Networks
    frozen: tuple[str, ...]  # networks with weights that are not parameters
    shapes: Table  # of the parameters
    init: Callable[[int], InitialWeights]  # seed -> path and initial value of each parameter
    # parameters, weights of the frozen networks -> weights of each network
    merge: Callable[[Table, Tables], Tables]
    rules: Rules = ANY


def train_denoiser(
    family: Family, networks: Networks, pretrained: LoadWeights = dict
) -> ParameterPartition:
    """Train all weights of the denoiser, from the `pretrained` ones or from random ones."""
    own = family.network
    frozen = tuple(name for name in networks if name != own)

    def merge(params: Table, frozen: Tables) -> Tables:
        return {**frozen, own: params}

    def init(seed: int) -> InitialWeights:
        yield from initial_or_pretrained(networks[own], pretrained().get(own), seed)

    shapes, rules = param_dict(networks[own]), family.adapter.sharding_rules
    return ParameterPartition(family, networks, frozen, shapes, init, merge, rules)


def initial_or_pretrained(
    network: nnx.Module, pretrained: Mapping[str, Any] | None, seed: int
) -> InitialWeights:
    """The `pretrained` weights in float32, or initial ones of `seed`."""
    if pretrained is None:
        yield from initial_weights(network, seed)
    else:
        for path, array in pretrained.items():
            yield path, np.asarray(array, np.float32)


class Frozen(NamedTuple):
    """The frozen weights of each network, and the null caption.

    The latter is each encoder's token ids or, where batches have text encodings, its encoding under
    the same keys.
    """

    weights: Tables
    null: dict[str, Any]


def sample_timesteps(
    key: Key[Array, "..."],
    shape: tuple[int, ...],
    num_timesteps: int,
    sampling: TimestepSampling,
) -> Int[Array, "..."]:
    """Timesteps 0 ... num_timesteps - 1, one per sample."""
    fraction = _sample_fractions(key, shape, sampling)
    return jnp.minimum((fraction * num_timesteps).astype(jnp.int32), num_timesteps - 1)


def sample_times(
    key: Key[Array, "..."],
    shape: tuple[int, ...],
    schedule: VPSchedule | FlowSchedule,
    sampling: TimestepSampling,
    num_tokens: int | None = None,
) -> Times:
    """The times of a schedule as `sample_timesteps` has them; those of a flow also by its shift.

    With `num_tokens`, of an image, that is not the schedule's shift but `resolution_shift`.
    """
    if isinstance(schedule, VPSchedule):
        return sample_timesteps(key, shape, schedule.num_discrete, sampling)
    if num_tokens is not None:
        schedule = dataclasses.replace(schedule, shift=resolution_shift(num_tokens))
    return schedule.time_scale * schedule.shifted(_sample_fractions(key, shape, sampling))


def _sample_fractions(
    key: Key[Array, "..."], shape: tuple[int, ...], sampling: TimestepSampling
) -> Float[Array, "..."]:
    """Times as fractions u of the whole, 0 to 1 (SD3, 2403.03206, section 3.1, eq. 19, 20 and 23).

    The `timestep_shift` s then maps u to s u / (1 + (s - 1) u).
    """
    if sampling.timestep_sampling == "logit_normal":
        normal = per_sample_normal(key, shape)
        u = jax.nn.sigmoid(sampling.logit_mean + sampling.logit_std * normal)
    else:
        u = per_sample_uniform(key, shape)
    if sampling.timestep_sampling == "mode":
        u = 1 - u - sampling.mode_scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)
        u = jnp.clip(u, 0, 1)  # of rounding alone
    shift = sampling.timestep_shift
    return shift * u / (1 + (shift - 1) * u)


def caption_dropout_masks(
    key: Key[Array, "..."],
    b: int,
    encoders: int,
    rate: float,
    rate_per_encoder: Sequence[float] = (),
) -> list[Bool[Array, "b"]]:
    """Which of b captions are dropped for each of the text encoders.

    A caption is dropped for all of them with probability `rate`, and for each alone with its own,
    independently: classifier-free guidance needs it (2207.12598, algorithm 1). Without encoders
    there is the first mask.
    """
    if not rate_per_encoder:
        return [per_sample_uniform(key, (b,)) < rate] * max(encoders, 1)
    key, *encoder_keys = per_sample_split(key, b, 1 + encoders)
    drop_all = per_sample_uniform(key, (b,)) < rate
    return [
        drop_all | (per_sample_uniform(k, (b,)) < r)
        for k, r in zip(encoder_keys, rate_per_encoder, strict=True)
    ]


def drop_captions(
    key: Key[Array, "..."],
    texts: Mapping[str, Int[Array, "b _"]],
    null: Mapping[str, Int[Array, "_"]],
    rate: float,
    rate_per_encoder: Sequence[float] = (),
) -> tuple[list[Int[Array, "b _"]], list[Bool[Array, "b"]]]:
    """Token ids with dropped captions, and the masks: see `caption_dropout_masks`."""
    b = len(next(iter(texts.values())))
    dropped = caption_dropout_masks(key, b, len(texts), rate, rate_per_encoder)
    pairs = zip(dropped, texts.items(), strict=True)
    return [jnp.where(d[:, None], null[name][None], ids) for d, (name, ids) in pairs], dropped


class LatentDiffusion:
    """A latent diffusion model in training, given parameters and frozen weights."""

    def __init__(self, partition: ParameterPartition, prediction_type: str) -> None:
        self.partition, self.family = partition, partition.family
        module = partition.networks[self.family.network]
        self.network = self.family.adapter(module, prediction_type)

    def merge_weights(self, params: Params, frozen: Frozen) -> Tables:
        """The weights of each network that are there; frozen weights have no gradient."""
        return self.partition.merge(params, jax.lax.stop_gradient(frozen.weights))

    def build_encoders(self, tables: Tables) -> dict[str, Any]:
        """The latent codec and the text encoders whose weights are there."""
        return {
            name: with_params(self.partition.networks[name], table)
            for name, table in tables.items()
            if name != self.family.network
        }

    def codec(self, tables: Tables) -> LatentCodec:
        """The latent codec with its weights."""
        networks = self.partition.networks
        return self.family.codec({n: with_params(networks[n], w) for n, w in tables.items()})

    def batch_latents(
        self, tables: Tables, batch: Mapping[str, Array], key: Key[Array, "..."]
    ) -> Float[Array, "b *space c"]:
        """The scaled latents of a batch, of its images or of their distributions."""
        if self.family.embeddings is not None:
            return self.codec(tables).scale(batch[IMAGE_EMBEDS])
        if "mean" in batch:
            codec = self.family.codec(self.partition.networks)
            return scaled_latents(codec, batch["mean"], batch["logvar"], key)
        return encode_latents(self.codec(tables), batch["image"], key)

    def encode_captions(
        self, encoders: Mapping[str, Any], ids: Sequence[Int[Array, "b _"]]
    ) -> list[TextEncoderOutput]:
        """The encodings of captions by each text encoder, whose token ids are `ids`."""
        pairs = zip(self.family.text_encoders, ids, strict=True)
        return [spec.encode(encoders[spec.component], each) for spec, each in pairs]

    def cached_text_encodings(
        self, arrays: Mapping[str, Array], dtype: Dtype
    ) -> list[TextEncoderOutput]:
        """Encodings that a batch has."""
        outputs = cached_outputs(self.family, arrays, self.partition.networks)
        return jax.tree.map(lambda a: a if a.dtype == jnp.bool_ else a.astype(dtype), outputs)

    def conditioning(
        self,
        encodings: Sequence[TextEncoderOutput],
        dropped: Sequence[Bool[Array, "b"]],
        batch: Mapping[str, Array],
    ) -> dict[str, Array]:
        """The network's conditioning; `dropped` are the captions that are the null caption."""
        if self.family.zero_uncond:
            encodings = [zero_rows(*pair) for pair in zip(dropped, encodings, strict=False)]
        # an input beside the text counts as that of no caption if no encoder reads the caption
        extras = self.family.batch_conditioning(batch, jnp.stack(dropped).all(axis=0))
        return self.family.text_conditioning(encodings) | extras


def trains_variance(config: DiffusionObjective, network: Any) -> bool:
    """Whether the loss has the bound of the variance that the network of an adapter learns."""
    discrete = isinstance(config.schedule, VPSchedule)
    return discrete and network.learns_variance and config.vlb_weight > 0


def diffusion_task(
    config: DiffusionObjective,
    partition: ParameterPartition,
    image_processor: CLIPImageProcessor | None = None,
) -> TrainingTask:
    """The task of training the parameters of `partition`.

    Batches have `image` (b, h, w, 3) in [-1, 1] and `ids` (b, n) int32, with a second text encoder
    `ids_2`, and may have `time_ids` (b, 6) and the loss `weight` (b,) of each image. Instead of
    images they may have `mean` and `logvar` (b, h, w, c) of their latents, and instead of ids text
    encodings: `states` (b, n, d), with a second encoder `states_2`, for models with a mask of the
    text `states_mask` (b, n), and with pooled embeddings `pooled` (b, p). `frozen_networks_used`
    lists the weights that are needed then. `image_processor` is an image encoder's.
    """
    model = LatentDiffusion(partition, config.prediction_type)
    make_columns = columns_of_images(partition.family, config.enlargement, image_processor)
    options = {"variance": True} if trains_variance(config, model.network) else {}

    def losses(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Float[Array, "b"], Times, Metrics]:
        """Weighted loss and timestep of each image, and what else is reported of the batch."""
        latent_key, drop_key, timestep_key, noise_key = per_sample_split(key, _size(batch), 4)
        tables = model.merge_weights(params, frozen)
        encoders = model.build_encoders(tables)
        if make_columns is not None:
            batch = batch | make_columns(encoders, batch, drop_key)
        x0 = model.batch_latents(tables, batch, latent_key)
        cond = _batch_conditioning(config, model, encoders, frozen.null, batch, drop_key)
        t = sample_times(
            timestep_key,
            x0.shape[:1],
            config.schedule,
            config,
            num_patches(x0) if config.timestep_shift_by_resolution else None,
        )
        eps = offset_noise(noise_key, x0.shape, config.noise_offset).astype(x0.dtype)
        weights = tables[model.family.network]
        call = functools.partial(model.network, weights, cond=cond, **options)
        per_image, bound = denoising_losses(config, call, x0, t, eps)
        metrics = {"latent_std": jnp.std(x0)}
        if bound is not None:
            per_image += config.vlb_weight * bound
            metrics["vlb"] = jnp.mean(bound)
        return per_image * batch["weight"] if "weight" in batch else per_image, t, metrics

    def loss(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        per_image, _, metrics = losses(params, frozen, batch, key)
        return jnp.mean(per_image), metrics

    def eval_metrics(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> Metrics:
        per_image, t, _ = losses(params, frozen, batch, key)
        schedule = config.schedule
        end = schedule.time_scale if isinstance(schedule, FlowSchedule) else schedule.num_discrete
        return {"loss": jnp.mean(per_image)} | loss_by_timestep_quartile(per_image, t, end)

    return TrainingTask(
        partition.shapes,
        partition.init,
        loss,
        rules=partition.rules,
        eval_metrics=eval_metrics,
        transformer=model.network.is_transformer,
    )


def _batch_conditioning(
    config: DiffusionObjective,
    model: LatentDiffusion,
    encoders: Mapping[str, Any],
    null: Mapping[str, Array],
    batch: dict[str, Array],
    key: Key[Array, "..."],
) -> dict[str, Array]:
    """The network's conditioning for a batch, in which some captions are dropped."""
    dtype = model.network.module.dtype
    rates, b = (config.caption_dropout, config.caption_dropout_per_encoder), _size(batch)
    cached = any(column in batch for column in (POOLED_COLUMN, *STATE_COLUMNS))
    if cached or not model.family.text_encoders:
        encodings = model.cached_text_encodings(batch, dtype)
        dropped = caption_dropout_masks(key, b, len(encodings), *rates)
        empty = model.cached_text_encodings(
            {name: array[None] for name, array in null.items()}, dtype
        )
        rows = zip(dropped, empty, encodings, strict=False)  # a mask also without encoders
        encodings = [select_rows(*each) for each in rows]
    else:
        texts = {name: batch[ids] for name, ids in model.family.id_columns.items()}
        ids, dropped = drop_captions(key, texts, null, *rates)
        encodings = model.encode_captions(encoders, ids)
    scale = jnp.full(b, config.distilled_guidance_scale, jnp.float32)
    return model.conditioning(encodings, dropped, {**batch, GUIDANCE_SCALE: scale})


def num_patches(latents: Float[Array, "b h w c"]) -> int:
    """The 2x2 patches of an image's latents: the tokens of SD3 and Flux."""
    return latents.shape[1] * latents.shape[2] // 4


def _size(batch: Mapping[str, Array]) -> int:
    """The number of images."""
    return len(batch["mean"] if "mean" in batch else batch["image"])


def offset_noise(
    key: Key[Array, "..."], shape: tuple[int, ...], amount: float
) -> Float[Array, "b *space c"]:
    """Standard normal noise plus `amount` times one normal sample per channel and image.

    A network trained on it can change the mean of an image (offset noise, N. Guttenberg, 2023).
    """
    if not amount:
        return per_sample_normal(key, shape)
    noise_key, offset_key = per_sample_split(key, shape[0], 2)
    offset = per_sample_normal(offset_key, (shape[0], *(1,) * len(shape[1:-1]), shape[-1]))
    return per_sample_normal(noise_key, shape) + amount * offset


def encode_latents(
    codec: LatentCodec, images: Float[Array, "b h2 w2 3"], key: Key[Array, "..."]
) -> Float[Array, "b h w c"]:
    """Scaled latents of images, sampled from the encoder's distribution."""
    return scaled_latents(codec, *codec.encode(images), key)


def scaled_latents(
    codec: LatentCodec,
    mean: Float[Array, "b h w c"],
    logvar: Float[Array, "b h w c"] | None,
    key: Key[Array, "..."],
) -> Float[Array, "b h w c"]:
    """Scaled latents, sampled from the distribution that the encoder gave."""
    if logvar is None:
        return codec.scale(mean)
    noise = per_sample_normal(key, mean.shape, mean.dtype)
    return codec.scale(sample_latents(mean, logvar, noise))


class DenoisingLosses(NamedTuple):
    """The parts of each image's loss."""

    error: Float[Array, "b"]  # the weighted squared error: L_simple, if the weight is 1
    bound: Float[Array, "b"] | None  # an estimate of L_vlb in bits per element, see `bound_terms`


def denoising_losses(
    config: DiffusionObjective,
    network: Callable[[Array, Array], Array],
    x0: Float[Array, "b *space c"],
    t: Times,
    eps: Float[Array, "b *space c"],
) -> DenoisingLosses:
    """The losses of `network(x_t, t)` at x_t = alpha x0 + sigma eps.

    A network that outputs twice the channels learns a variance, the second half. Only that is
    trained by the bound, which has no gradient for the prediction (2102.09672, section 3.1).
    """
    alpha, sigma = config.schedule.alpha_sigma(t)
    prediction_type = config.prediction_type
    x = add_noise(x0, eps, alpha, sigma)
    output, variance = jnp.split(network(x, t), [x0.shape[-1]], axis=-1)
    weight = loss_weights(config.weighting, prediction_type, snr(alpha, sigma), config.snr_gamma)
    pair = regression(prediction_type, output, x0, eps, alpha, sigma)
    error = squared_errors(*pair, weight)
    schedule = config.schedule
    if not variance.size or not isinstance(schedule, VPSchedule):
        return DenoisingLosses(error, None)
    D = predict(prediction_type, jax.lax.stop_gradient(output), x, alpha, sigma).x0
    terms = bound_terms(schedule, variance, D, x0, t)
    return DenoisingLosses(error, schedule.num_discrete * terms)
