"""Denoising of latents told what the picture shows: latent diffusion (2112.10752)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Dtype, Float, Int, Key
from jaxdiff.diffusion.losses import add_noise, snr, squared_errors
from jaxdiff.diffusion.losses import weights as loss_weights
from jaxdiff.diffusion.predictions import target
from jaxdiff.models.build import with_params
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.conditioning import (
    EMBEDDING_COLUMNS,
    ENCODERS,
    POOLED,
    TextEncoderOutput,
    UNetConditioning,
    encode_text,
    make_conditioning,
    num_time_ids,
    select,
)
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.training.config import DiffusionObjective
from jaxdiff.training.objectives import Learner, Metrics, Params
from jaxdiff.training.objectives.trainable import Tables, Tuned
from jaxdiff.training.objectives.vae import sample_latents
from jaxdiff.training.per_sample_random import (
    per_sample_normal,
    per_sample_split,
    per_sample_uniform,
)

# What a batch calls the ids that each text encoder reads.
IDS: dict[str, str] = dict(zip(ENCODERS, ("ids", "ids_2"), strict=True))


class Frozen(NamedTuple):
    """What is not trained: weights of each network, and the empty caption.

    That is each encoder's ids or, where batches have what encoders say, the same of it, by the
    names that batches have for it.
    """

    weights: Tables
    null: dict[str, Any]


def read_in_steps(tuned: Tuned, *, latents: bool, said: bool) -> tuple[str, ...]:
    """The networks whose frozen weights a step reads.

    `latents` and `said` are whether batches have latents, and what text encoders say.
    """
    spared = {*(("vae",) if latents else ()), *(ENCODERS if said else ())}
    return tuple(name for name in tuned.frozen if name not in spared)


def draw_times(
    key: Key[Array, "..."], shape: tuple[int, ...], levels: int, how: str, shift: float = 1.0
) -> Int[Array, "..."]:
    """Noise levels 0 ... levels - 1, one draw per sample (SD3, 2403.03206, section 3.1 and eq. 23).

    `how` spreads u over [0, 1): `uniform`, or `logit_normal`, the sigmoid of a standard normal,
    the middle more often than the ends. `shift` s then moves it to s u / (1 + (s - 1) u).
    """
    u = (
        per_sample_uniform(key, shape)
        if how == "uniform"
        else jax.nn.sigmoid(per_sample_normal(key, shape))
    )
    moved = shift * u / (1 + (shift - 1) * u)
    return jnp.minimum((moved * levels).astype(jnp.int32), levels - 1)


def lost(
    key: Key[Array, "..."], b: int, encoders: int, rate: float, each: Sequence[float] = ()
) -> list[Bool[Array, "b"]]:
    """Which of b captions each of the text encoders is not told.

    A caption is dropped for all of them with probability `rate`, and for each alone with its own,
    each independently: what classifier-free guidance needs (2207.12598, algorithm 1).
    """
    if not each:
        return [per_sample_uniform(key, (b,)) < rate] * encoders
    key, *alone = per_sample_split(key, b, 1 + encoders)
    all_lose = per_sample_uniform(key, (b,)) < rate
    return [all_lose | (per_sample_uniform(k, (b,)) < r) for k, r in zip(alone, each, strict=True)]


def drop_for_each(
    key: Key[Array, "..."],
    texts: Mapping[str, Int[Array, "b _"]],
    null: Mapping[str, Int[Array, "_"]],
    rate: float,
    each: Sequence[float] = (),
) -> tuple[list[Int[Array, "b _"]], list[Bool[Array, "b"]]]:
    """What each text encoder reads, and which captions are the null one for it: see `lost`."""
    b = len(next(iter(texts.values())))
    dropped = lost(key, b, len(texts), rate, each)
    pairs = zip(dropped, texts.items(), strict=True)
    return [jnp.where(d[:, None], null[name][None], ids) for d, (name, ids) in pairs], dropped


def picture_sizes(batch: Mapping[str, Array]) -> Float[Array, "b 6"]:
    """What SDXL is told of pictures' sizes: as recorded, or that they are whole."""
    if "time_ids" in batch:
        return batch["time_ids"].astype(jnp.float32)
    b, h, w, _ = batch["image"].shape
    return jnp.tile(jnp.array([[h, w, 0, 0, h, w]], jnp.float32), (b, 1))


class Model:
    """A diffusion model in training: what it tells its UNet, given parameters and frozen weights.

    `silent_null` tells zeros of the null caption instead of what the encoders say of it.
    """

    def __init__(self, tuned: Tuned, *, silent_null: bool = False) -> None:
        self.tuned, self.silent_null = tuned, silent_null
        self.texts = {name: IDS[name] for name in ENCODERS if name in tuned.networks}
        unet = cast(UNet2DConditionModel, tuned.networks["unet"])
        encoders = [cast(CLIPTextModel, tuned.networks[name]) for name in self.texts]
        self.sized = num_time_ids(unet.config, encoders) is not None

    def assembled(self, params: Params, frozen: Frozen) -> dict[str, Any]:
        """The networks whose weights there are; through the frozen ones no gradient flows."""
        tables = self.tuned.join(params, jax.lax.stop_gradient(frozen.weights))
        return {
            name: with_params(self.tuned.networks[name], table) for name, table in tables.items()
        }

    def heard(
        self, networks: Mapping[str, Any], ids: Sequence[Int[Array, "b _"]]
    ) -> list[TextEncoderOutput]:
        """What each text encoder says of the captions that are these `ids` for it."""
        pairs = zip(self.texts, ids, strict=True)
        return [encode_text(networks[name], each, pooled=self.sized) for name, each in pairs]

    def stored(self, arrays: Mapping[str, Array], dtype: Dtype) -> list[TextEncoderOutput]:
        """The same as a batch has it."""
        ends = [None] * (len(self.texts) - 1) + [arrays[POOLED] if self.sized else None]
        pairs = zip(self.texts, ends, strict=True)
        each = [TextEncoderOutput(arrays[EMBEDDING_COLUMNS[name]], end) for name, end in pairs]
        return jax.tree.map(lambda array: array.astype(dtype), each)

    def told(
        self,
        heard: Sequence[TextEncoderOutput],
        dropped: Sequence[Bool[Array, "b"]],
        sizes: Float[Array, "b 6"] | None,
    ) -> UNetConditioning:
        """The conditions of what encoders say, `dropped` where that is of the null caption."""
        silent = dropped if self.silent_null else None
        return make_conditioning(heard, sizes if self.sized else None, zeroed=silent)


def diffusion_learner(
    config: DiffusionObjective, tuned: Tuned, *, silent_null: bool = False
) -> Learner:
    """The learner of a model's parameters, as `tuned` divides its weights.

    Batches have `image` (b, h, w, 3) in [-1, 1] and `ids` (b, n) int32, with a second text encoder
    `ids_2`, and may have `time_ids` (b, 6) and the `weight` (b,) of each picture. Instead of
    pictures they may have `mean` and `logvar` (b, h, w, c) of their latents, and instead of ids
    what the text encoders say: `states` (b, n, d), with a second one `states_2`, and where it is
    told `pooled` (b, p). See `read_in_steps` for the weights that are then not read.
    """
    model = Model(tuned, silent_null=silent_null)
    vae = cast(AutoencoderKL, tuned.networks["vae"])
    unet = cast(UNet2DConditionModel, tuned.networks["unet"])

    def latents(
        networks: Mapping[str, Any], batch: dict[str, Array], key: Key[Array, "..."]
    ) -> Float[Array, "b h w c"]:
        if "mean" in batch:
            return vae.scale(sample_latents(batch["mean"], batch["logvar"], key))
        return encoded(networks["vae"], batch["image"], key)

    def told(
        networks: Mapping[str, Any],
        null: Mapping[str, Array],
        batch: dict[str, Array],
        key: Key[Array, "..."],
    ) -> UNetConditioning:
        rates = config.caption_dropout, config.caption_dropout_per_encoder
        if EMBEDDING_COLUMNS[ENCODERS[0]] in batch:
            heard = model.stored(batch, unet.dtype)
            dropped = lost(key, len(heard[0].hidden_states), len(heard), *rates)
            empty = model.stored({name: array[None] for name, array in null.items()}, unet.dtype)
            heard = [select(*three) for three in zip(dropped, empty, heard, strict=True)]
        else:
            texts = {name: batch[ids] for name, ids in model.texts.items()}
            ids, dropped = drop_for_each(key, texts, null, *rates)
            heard = model.heard(networks, ids)
        return model.told(heard, dropped, picture_sizes(batch) if model.sized else None)

    def errors(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Float[Array, "b"], Int[Array, "b"], Float[Array, ""]]:
        """The weighted error and the noise level of each picture, and the latents' deviation."""
        b = len(batch["mean"] if "mean" in batch else batch["image"])
        latent_key, drop_key, time_key, noise_key = per_sample_split(key, b, 4)
        networks = model.assembled(params, frozen)
        x0 = latents(networks, batch, latent_key)
        known = told(networks, frozen.null, batch, drop_key)
        levels, shape = config.schedule.num_timesteps, x0.shape[:1]
        t = draw_times(time_key, shape, levels, config.timestep_sampling, config.timestep_shift)
        eps = offset_noise(noise_key, x0.shape, config.noise_offset).astype(x0.dtype)
        network = networks["unet"]
        each = denoising_errors(config, lambda x, t: network(x, t, **known._asdict()), x0, t, eps)
        return each * batch["weight"] if "weight" in batch else each, t, jnp.std(x0)

    def loss(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        each, _, deviation = errors(params, frozen, batch, key)
        return jnp.mean(each), {"latent_std": deviation}

    def measure(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> Metrics:
        each, t, _ = errors(params, frozen, batch, key)
        return {"loss": jnp.mean(each)} | by_quartile(each, t, config.schedule.num_timesteps)

    return Learner(tuned.shapes, tuned.init, loss, rules=tuned.rules, measure=measure)


def by_quartile(
    errors: Float[Array, "b"], t: Int[Array, "b"], levels: int
) -> dict[str, Float[Array, ""]]:
    """The mean error in each quarter of the noise levels, loss_q1 the cleanest; 0 where none is."""
    quarter = 4 * t // levels
    means = {}
    for i in range(4):
        inside = (quarter == i).astype(errors.dtype)
        means[f"loss_q{i + 1}"] = jnp.sum(errors * inside) / jnp.maximum(jnp.sum(inside), 1)
    return means


def offset_noise(
    key: Key[Array, "..."], shape: tuple[int, ...], amount: float
) -> Float[Array, "b h w c"]:
    """Standard normal noise plus `amount` times one draw for each channel of each picture.

    A network trained on it can change the mean of a picture (offset noise, N. Guttenberg, 2023).
    """
    if not amount:
        return per_sample_normal(key, shape)
    noise_key, offset_key = per_sample_split(key, shape[0], 2)
    offset = per_sample_normal(offset_key, (shape[0], 1, 1, shape[3]))
    return per_sample_normal(noise_key, shape) + amount * offset


def encoded(
    vae: AutoencoderKL, images: Float[Array, "b h2 w2 3"], key: Key[Array, "..."]
) -> Float[Array, "b h w c"]:
    """Scaled latents of pictures, drawn from the encoder's distribution."""
    return vae.scale(sample_latents(*vae.encode(images), key))


def denoising_errors(
    config: DiffusionObjective,
    network: Callable[[Array, Array], Array],
    x0: Float[Array, "b h w c"],
    t: Int[Array, "b"],
    eps: Float[Array, "b h w c"],
) -> Float[Array, "b"]:
    """Each picture's weighted squared error of `network(x_t, t)` at x_t = alpha x0 + sigma eps."""
    alpha, sigma = config.schedule.alpha_sigma(t)
    kind = config.prediction_type
    output = network(add_noise(x0, eps, alpha, sigma), t)
    weight = loss_weights(config.weighting, kind, snr(alpha, sigma), config.snr_gamma)
    return squared_errors(output, target(kind, x0, eps, alpha, sigma), weight)
