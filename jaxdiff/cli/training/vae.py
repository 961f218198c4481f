"""Training the VAE: pictures alone."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import cast

import jax
import numpy as np

from jaxdiff.checkpoints.components import Component, write_component
from jaxdiff.cli.training.experiment import (
    SHOWN,
    Experiment,
    grid,
    save_grid,
    spread,
    training_batches,
    validation_batch,
)
from jaxdiff.core.types import Dtype, Float, NDArray
from jaxdiff.models.build import abstract, assemble
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.parallel.processes import fetch
from jaxdiff.training.config import TrainConfig, VAEObjective
from jaxdiff.training.objectives import Params, Whole
from jaxdiff.training.objectives.vae import latent_moments, reconstruct, vae_learner

MEASURED = 2048  # training pictures from which the latents' standard deviation is measured


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
    moments = jax.jit(lambda params, images: latent_moments(assemble(template, params), images))
    size = 64 if config.data.kind == "scenes" else config.batch_size
    stream = training_batches(dataclasses.replace(config, batch_size=size), process_count=1)
    parts = [moments(params, next(stream)["image"]) for _ in range(-(-MEASURED // size))]
    mean, square = np.mean(np.asarray(parts, np.float64), axis=0)
    factor = float(1 / np.sqrt(square - mean**2))
    return dataclasses.replace(model, scaling_factor=factor, shift_factor=None)


def vae_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Grids are validation pictures over their reconstructions, the measure is their PSNR."""
    objective = cast(VAEObjective, config.objective)
    images = validation_batch(config)["image"]
    template = abstract(AutoencoderKL, objective.model, dtype=dtype)
    rebuild = jax.jit(lambda params, images: reconstruct(assemble(template, params), images))

    def sample(step: int, params: Params) -> Mapping[str, float]:
        rebuilt = fetch(rebuild(params, spread({"image": images})["image"]))
        pairs = np.concatenate([images[:SHOWN], rebuilt[:SHOWN]])
        save_grid(workdir, step, grid(pairs, len(pairs) // 2))
        return {"validation_psnr": psnr(images, rebuilt)}

    def export(params: Whole, folder: pathlib.Path) -> None:
        module = abstract(AutoencoderKL, with_measured_scale(config, params))
        write_component(folder, Component(module=assemble(module, params)))

    learner = vae_learner(objective, dtype)
    return Experiment(learner, {}, training_batches(config), sample, export)
