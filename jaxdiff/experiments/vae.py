"""Training the VAE: pictures alone."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.clip_vision import clip_folder, read_vision
from jaxdiff.checkpoints.components import Component, read_component, write_component
from jaxdiff.checkpoints.training_state import has_checkpoint
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float, NDArray
from jaxdiff.experiments.experiment import (
    CHECKPOINTS,
    SHOWN,
    Experiment,
    grid,
    save_grid,
    scene_side,
    spread,
    training_batches,
    validation_batch,
)
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.parallel.distributed import gather_to_host
from jaxdiff.training.config import TrainConfig, VAEObjective
from jaxdiff.training.objectives import Params, Whole
from jaxdiff.training.objectives.perceptual import Eye
from jaxdiff.training.objectives.vae import (
    Frozen,
    is_decoder,
    latent_moments,
    reconstruct,
    vae_learner,
    whole_vae,
)

MEASURED = 2048  # training pictures from which the latents' standard deviation is measured
# Fields of a VAE's config that its weights do not depend on, and those that an export measures.
FREE, SCALES = {"sample_size", "force_upcast"}, {"scaling_factor", "shift_factor"}


def psnr(images: Float[NDArray, "n h w c"], other: Float[NDArray, "n h w c"]) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], from the mean of their errors."""
    error = np.mean((images.astype(np.float64) - other.clip(-1, 1)) ** 2)
    return float(10 * np.log10(4 / error))


def with_measured_scale(config: TrainConfig, params: Whole) -> AutoencoderKLConfig:
    """The VAE's config with the scaling factor that brings its latents to unit variance.

    A shift would bring their mean to 0 too, but StableDiffusionPipeline does not apply one.
    """
    model = cast(VAEObjective, config.objective).model
    template = abstract(AutoencoderKL, model)
    moments = jax.jit(lambda params, images: latent_moments(with_params(template, params), images))
    size = 64 if config.data.kind == "scenes" else config.batch_size
    stream = training_batches(dataclasses.replace(config, batch_size=size), process_count=1)
    parts = [moments(params, next(stream)["image"]) for _ in range(-(-MEASURED // size))]
    mean, square = np.mean(np.asarray(parts, np.float64), axis=0)
    factor = float(1 / np.sqrt(square - mean**2))
    return dataclasses.replace(model, scaling_factor=factor, shift_factor=None)


def _given(objective: VAEObjective, folder: pathlib.Path) -> Component:
    """The VAE in `folder`, in float32; InputError unless it is one as `objective` has it."""
    found = read_component(folder, dtype=jnp.float32)
    if not isinstance(found.module, AutoencoderKL):
        name = type(found.module).__name__
        raise InputError(f"objective.weights: got {name} in {folder}, expected AutoencoderKL")
    free = FREE if objective.freeze_encoder else FREE | SCALES
    for field in dataclasses.fields(AutoencoderKLConfig):
        ours, theirs = (getattr(c, field.name) for c in (objective.model, found.module.config))
        if field.name not in free and ours != theirs:
            raise InputError(
                f"objective.model.{field.name}: got {ours}, expected {theirs} as {folder} has"
            )
    return found


def _eye(objective: VAEObjective, dtype: Dtype) -> tuple[Eye, dict[str, Any]] | None:
    """What compares pictures, and its weights."""
    if objective.perceptual_model is None:
        return None
    module, lens = read_vision(clip_folder(pathlib.Path(objective.perceptual_model)), dtype=dtype)
    return Eye(module, lens), param_dict(module)


def vae_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Grids are validation pictures over their reconstructions, the measure is their PSNR."""
    objective = cast(VAEObjective, config.objective)
    if config.data.kind == "scenes":
        scene_side(config.data, objective.model.downscale)
    begun = has_checkpoint(workdir / CHECKPOINTS)
    given, identity = None, {}
    if objective.weights is not None and (objective.freeze_encoder or not begun):
        given = _given(objective, pathlib.Path(objective.weights))
    table = {} if given is None else param_dict(given.module)
    kept = None
    if given is not None and objective.freeze_encoder:
        kept = cast(AutoencoderKL, given.module).config, given.config
        file = find_weights(pathlib.Path(str(objective.weights)))
        identity = {"weights of the encoder": digest(file)}
    eye, seeing = _eye(objective, dtype) or (None, {})
    still = {k: v for k, v in table.items() if objective.freeze_encoder and not is_decoder(k)}
    frozen = Frozen(encoder=still, eye=seeing)
    images = validation_batch(config)["image"]
    template = abstract(AutoencoderKL, objective.model, dtype=dtype)

    @jax.jit
    def rebuild(params: Params, frozen: Frozen, images: Array) -> Array:
        return reconstruct(with_params(template, whole_vae(objective, params, frozen)), images)

    def sample(step: int, params: Params) -> Mapping[str, float]:
        rebuilt = gather_to_host(rebuild(params, frozen, spread({"image": images})["image"]))
        pairs = np.concatenate([images[:SHOWN], rebuilt[:SHOWN]])
        save_grid(workdir, step, grid(pairs, len(pairs) // 2))
        return {"validation_psnr": psnr(images, rebuilt)}

    def export(params: Whole, folder: pathlib.Path) -> None:
        learnt = whole_vae(objective, params, frozen)
        # Of an encoder that stays, latents are what they were.
        model, raw = kept if kept is not None else (with_measured_scale(config, learnt), {})
        module = with_params(abstract(AutoencoderKL, model), learnt)
        write_component(folder, Component(module=module, config=raw))

    learner = vae_learner(objective, dtype, given=gather_to_host(table) or None, eye=eye)
    return Experiment(learner, frozen, training_batches(config), sample, export, identity)
