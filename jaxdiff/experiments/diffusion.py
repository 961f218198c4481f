"""Training a diffusion model: its UNet, all of its text side too, or small additions to it."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.training_state import has_checkpoint
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, NDArray
from jaxdiff.data.latents import LatentCacheInfo, read_null
from jaxdiff.data.texts import CaptionTokenizer
from jaxdiff.experiments.base_model import Begun, begin
from jaxdiff.experiments.evaluation import make_evaluation
from jaxdiff.experiments.experiment import (
    CHECKPOINTS,
    SHOWN,
    Experiment,
    check_kind,
    grid,
    save_grid,
    scene_side,
    spread,
    training_batches,
    validation_batch,
    validation_captions,
)
from jaxdiff.experiments.latent_cache import cached
from jaxdiff.experiments.prior_preservation import with_prior
from jaxdiff.experiments.sample_grid import (
    SAMPLER,
    SPACING,
    make_sampler,
    shown_noise,
    shown_prompts,
)
from jaxdiff.experiments.training_methods import tuning
from jaxdiff.models.build import with_params
from jaxdiff.models.conditioning import UNetConditioning
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.parallel.distributed import gather_to_host
from jaxdiff.samplers.registry import make_grid
from jaxdiff.training.config import DataConfig, DiffusionObjective, Full, TrainConfig
from jaxdiff.training.objectives import Params
from jaxdiff.training.objectives.diffusion import (
    IDS,
    Frozen,
    Model,
    diffusion_learner,
    read_in_steps,
)
from jaxdiff.training.objectives.trainable import Tuned


def _side(data: DataConfig, made: LatentCacheInfo | None) -> int:
    """Side of the (square) pictures in pixels."""
    if data.kind == "scenes":
        return scene_side(data)
    return (data.resolution or 0) if made is None else made.resolution


def _cached(config: TrainConfig, begun: Begun, tuned: Tuned) -> LatentCacheInfo | None:
    """What is cached of the data; InputError unless as much is of the prior's."""
    made, prior = cached(config.data, begun, tuned), begun.objective.prior_data
    if prior is not None:
        other = cached(prior, begun, tuned, field="objective.prior_data")
        said, wanted = (
            (x.text_embedding_shapes, x.dtype) if x and x.text_embedding_shapes else ()
            for x in (other, made)
        )
        if said != wanted:
            kinds = (f"embeddings in {x[1]}" if x else "captions" for x in (said, wanted))
            raise InputError(
                "objective.prior_data: got data with {}, expected {} as data has".format(*kinds)
            )
    return made


def _check_size(config: TrainConfig, begun: Begun, side: int) -> None:
    """InputError unless the UNet is for the latents that the VAE makes of pictures of `side`.

    That of a pipeline may be trained at another size than before.
    """
    model, vae = begun.objective.model, begun.vae
    if config.data.kind == "scenes":
        scene_side(config.data, vae.config.downscale)
    channels = vae.config.latent_channels
    wanted = {"in_channels": channels, "out_channels": channels}
    if cast(DiffusionObjective, config.objective).pipeline is None:
        wanted = {"sample_size": side // vae.config.downscale} | wanted
    for name, value in wanted.items():
        if getattr(model, name) != value:
            raise InputError(
                f"objective.model.{name}: got {getattr(model, name)}, expected {value} as the "
                f"latents of {begun.objective.vae} have"
            )


def _sampler(objective: DiffusionObjective, model: Model) -> Callable[..., Array]:
    def network(weights: Any, x: Array, t: Array, told: UNetConditioning) -> Array:
        return with_params(model.tuned.networks["unet"], weights)(x, t, **told._asdict())

    def prepare(
        params: Params, frozen: Frozen, shown: Mapping[str, Array]
    ) -> tuple[Params, tuple[UNetConditioning, ...], AutoencoderKL]:
        networks, b = model.assembled(params, frozen), len(shown["noise"])
        texts = model.texts.items()
        own = [shown[ids] for _, ids in texts]
        null = [jnp.broadcast_to(frozen.null[name], shown[ids].shape) for name, ids in texts]
        nothing, everything = jnp.zeros(b, bool), jnp.ones(b, bool)
        streams = tuple(
            model.told(model.heard(networks, ids), [dropped] * len(ids), shown.get("time_ids"))
            for ids, dropped in ((null, everything), (own, nothing))
        )
        tables = model.tuned.join(params, frozen.weights)
        return tables["unet"], streams, networks["vae"]

    kind, steps = objective.prediction_type, objective.sample_steps
    levels = make_grid(objective.schedule, SAMPLER, steps, prediction_type=kind, spacing=SPACING)
    choices = {"rule": "cfg", "kind": kind, "scale": objective.sample_guidance_scale}
    return make_sampler(network, levels, prepare, **choices)


def _prompts(config: TrainConfig, texts: CaptionTokenizer) -> list[str]:
    """What the pictures of the grids are of; InputError if none has the word that is learnt."""
    scenes = config.data.kind == "scenes"
    prompts = shown_prompts() if scenes else validation_captions(config, SHOWN)
    for word in texts.placeholder_tokens:
        if not any(word in (texts.caption or prompt) for prompt in prompts):
            raise InputError(
                f"objective.trainable.placeholder_token: got {word!r}, which no caption has, "
                "expected captions with it, such as a data.caption"
            )
    return prompts


def _shown(begun: Begun, side: int, count: int) -> dict[str, NDArray]:
    """What `count` pictures begin with, and what the UNet is told of their sizes."""
    vae = begun.vae.config
    noise = shown_noise(side // vae.downscale, vae.latent_channels, count)
    sizes = np.tile(np.array([[side, side, 0, 0, side, side]], np.float32), (count, 1))
    return {"noise": noise, "time_ids": sizes}


def diffusion_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Grids are pictures of fixed prompts; the measure is the loss on validation pictures."""
    check_kind(config)
    resumed = has_checkpoint(workdir / CHECKPOINTS)
    begun = begin(cast(DiffusionObjective, config.objective), resumed=resumed)
    chosen = tuning(begun, dtype, config.data.caption)
    texts, objective = chosen.texts, begun.objective
    made = _cached(config, begun, chosen.tuned)
    side = _side(config.data, made)
    _check_size(config, begun, side)
    frozen = Frozen(
        weights={name: begun.table(name, dtype) for name in chosen.tuned.frozen},
        null={name: texts([""])[IDS[name]][0] for name in begun.encoders},
    )
    tokenizer = None if made is not None and made.text_embedding_shapes else texts
    read = _read_in_steps(config, chosen.tuned, frozen, made)
    learner = diffusion_learner(objective, chosen.tuned, silent_null=begun.silent_null)
    model = Model(chosen.tuned, silent_null=begun.silent_null)
    draw = jax.jit(_sampler(objective, model))
    measure = jax.jit(learner.measure)

    def told(captions: Sequence[str]) -> dict[str, NDArray]:
        return texts(captions) | _shown(begun, side, len(captions))

    shown = spread(told(_prompts(config, texts)))
    held_out = validation_batch(config, tokenizer)
    batch = spread(held_out)
    named = dataclasses.replace(config, objective=objective)
    evaluate = make_evaluation(named, told, begun.vae, held_out)

    def sample(step: int, params: Params) -> Mapping[str, float]:
        save_grid(workdir, step, grid(gather_to_host(draw(params, frozen, shown)), SHOWN // 2))
        found = jax.device_get(measure(params, read, batch, jax.random.key(0)))
        found |= evaluate(lambda shown: draw(params, frozen, shown))
        return {f"validation_{name}": float(value) for name, value in found.items()}

    if objective.prior_data is None:
        stream = training_batches(config, tokenizer)
    else:
        stream = with_prior(config, objective.prior_data, objective.prior_loss_weight, tokenizer)
    return Experiment(learner, read, stream, sample, chosen.export, identity_of(config, begun))


def _read_in_steps(
    config: TrainConfig, tuned: Tuned, frozen: Frozen, made: LatentCacheInfo | None
) -> Frozen:
    """What a step reads of all that pictures are drawn with, where latents are cached."""
    if made is None:
        return frozen
    names = read_in_steps(tuned, latents=True, said=bool(made.text_embedding_shapes))
    null = (
        read_null(pathlib.Path(str(config.data.path)), made)
        if made.text_embedding_shapes
        else frozen.null
    )
    return Frozen({name: frozen.weights[name] for name in names}, null)


def identity_of(config: TrainConfig, begun: Begun) -> dict[str, Any]:
    """What of the model that a training began with must not change on the way."""
    said: dict[str, Any] = {f"weights of {name}": mark for name, mark in begun.digests.items()}
    objective = cast(DiffusionObjective, config.objective)
    if objective.pipeline is None:
        if isinstance(objective.trainable, Full):  # a checkpoint's take their place
            said.pop("weights of unet", None)
        return said
    values = {name: getattr(begun.objective, name) for name in ("model", "schedule")}
    for name, value in values.items():
        fields = dataclasses.asdict(value)
        said |= {f"objective.{name}.{key}": item for key, item in fields.items()}
    return said | {"objective.prediction_type": begun.objective.prediction_type}
