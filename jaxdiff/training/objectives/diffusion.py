"""Denoising of latents told what the picture shows: latent diffusion (2112.10752)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Float, Int, Key
from jaxdiff.diffusion.losses import diffuse, snr, squared_errors
from jaxdiff.diffusion.losses import weights as loss_weights
from jaxdiff.diffusion.predictions import target
from jaxdiff.models.build import assemble
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.conditions import ENCODERS, Conditions, conditions, numbers_told
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.training import draws
from jaxdiff.training.config import DiffusionObjective
from jaxdiff.training.objectives import Learner, Metrics, Params
from jaxdiff.training.objectives.tuning import Tables, Tuned
from jaxdiff.training.objectives.vae import sample_latents

# What a batch calls the ids that each text encoder reads.
IDS: dict[str, str] = dict(zip(ENCODERS, ("ids", "ids_2"), strict=True))


class Frozen(NamedTuple):
    """What is not trained: weights of each network, and the empty caption as each encoder's ids."""

    weights: Tables
    null: dict[str, Int[Array, "n"]]


def draw_times(
    key: Key[Array, "..."], shape: tuple[int, ...], levels: int, how: str, shift: float = 1.0
) -> Int[Array, "..."]:
    """Noise levels 0 ... levels - 1, one draw per sample (SD3, 2403.03206, section 3.1 and eq. 23).

    `how` spreads u over [0, 1): `uniform`, or `logit_normal`, the sigmoid of a standard normal,
    the middle more often than the ends. `shift` s then moves it to s u / (1 + (s - 1) u).
    """
    u = draws.uniform(key, shape) if how == "uniform" else jax.nn.sigmoid(draws.normal(key, shape))
    moved = shift * u / (1 + (shift - 1) * u)
    return jnp.minimum((moved * levels).astype(jnp.int32), levels - 1)


def drop_captions(
    key: Key[Array, "..."], ids: Int[Array, "b n"], null: Int[Array, "n"], rate: float
) -> tuple[Int[Array, "b n"], Bool[Array, "b"]]:
    """`ids` with each caption replaced by the null caption with probability `rate`, independently.

    What classifier-free guidance needs (2207.12598, algorithm 1). Also says which were dropped.
    """
    dropped = draws.uniform(key, (len(ids),)) < rate
    return jnp.where(dropped[:, None], null[None], ids), dropped


def drop_for_each(
    key: Key[Array, "..."],
    texts: Mapping[str, Int[Array, "b _"]],
    null: Mapping[str, Int[Array, "_"]],
    rate: float,
    each: Sequence[float] = (),
) -> tuple[list[Int[Array, "b _"]], list[Bool[Array, "b"]]]:
    """What each text encoder reads, and which captions it is not told.

    A caption is dropped for all of them with probability `rate`, and for each alone with its own.
    """
    b = len(next(iter(texts.values())))
    key, *alone = draws.split(key, b, 1 + len(texts)) if each else (key,)
    read, dropped = [], []
    for i, (name, ids) in enumerate(texts.items()):
        kept, away = drop_captions(key, ids, null[name], rate)
        if each:
            kept, more = drop_captions(alone[i], kept, null[name], each[i])
            away = away | more
        read.append(kept)
        dropped.append(away)
    return read, dropped


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
        self.sized = numbers_told(unet.config, encoders) is not None

    def assembled(self, params: Params, frozen: Frozen) -> dict[str, Any]:
        """All networks with their weights; through the frozen ones no gradient flows."""
        tables = self.tuned.join(params, jax.lax.stop_gradient(frozen.weights))
        return {name: assemble(net, tables[name]) for name, net in self.tuned.networks.items()}

    def told(
        self,
        networks: Mapping[str, Any],
        ids: Sequence[Int[Array, "b _"]],
        dropped: Sequence[Bool[Array, "b"]],
        sizes: Float[Array, "b 6"] | None,
    ) -> Conditions:
        """The conditions of captions of which some are dropped, `ids` being what is left."""
        encoders = [networks[name] for name in self.texts]
        silent = dropped if self.silent_null else None
        return conditions(encoders, ids, sizes if self.sized else None, silent=silent)


def diffusion_learner(
    config: DiffusionObjective, tuned: Tuned, *, silent_null: bool = False
) -> Learner:
    """The learner of a model's parameters, as `tuned` divides its weights.

    Batches have `image` (b, h, w, 3) in [-1, 1] and `ids` (b, n) int32, with a second text encoder
    `ids_2`, and may have `time_ids` (b, 6) and the `weight` (b,) of each picture. Instead of
    pictures they may have `mean` and `logvar` (b, h, w, c) of their latents; the VAE's weights are
    then not read.
    """
    model = Model(tuned, silent_null=silent_null)

    def latents(
        vae: AutoencoderKL, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> Float[Array, "b h w c"]:
        if "mean" in batch:
            return vae.scale(sample_latents(batch["mean"], batch["logvar"], key))
        return encoded(vae, batch["image"], key)

    def errors(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Float[Array, "b"], Int[Array, "b"], Float[Array, ""]]:
        """The weighted error and the noise level of each picture, and the latents' deviation."""
        latent_key, drop_key, time_key, noise_key = draws.split(key, len(batch["ids"]), 4)
        networks = model.assembled(params, frozen)
        x0 = latents(networks["vae"], batch, latent_key)
        texts = {name: batch[ids] for name, ids in model.texts.items()}
        rates = config.caption_dropout, config.caption_dropout_each
        read = drop_for_each(drop_key, texts, frozen.null, *rates)
        told = model.told(networks, *read, picture_sizes(batch) if model.sized else None)
        levels, shape = config.schedule.levels, x0.shape[:1]
        t = draw_times(time_key, shape, levels, config.times, config.time_shift)
        eps = offset_noise(noise_key, x0.shape, config.noise_offset).astype(x0.dtype)
        unet = networks["unet"]
        each = denoising_errors(config, lambda x, t: unet(x, t, **told._asdict()), x0, t, eps)
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
        return {"loss": jnp.mean(each)} | by_quartile(each, t, config.schedule.levels)

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
        return draws.normal(key, shape)
    noise_key, offset_key = draws.split(key, shape[0], 2)
    offset = draws.normal(offset_key, (shape[0], 1, 1, shape[3]))
    return draws.normal(noise_key, shape) + amount * offset


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
    alpha, sigma = config.schedule.gather(t)
    kind = config.prediction_type
    output = network(diffuse(x0, eps, alpha, sigma), t)
    weight = loss_weights(config.weighting, kind, snr(alpha, sigma), config.gamma)
    return squared_errors(output, target(kind, x0, eps, alpha, sigma), weight)
