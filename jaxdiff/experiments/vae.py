"""Training the VAE."""

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
    GRID_SIZE,
    Experiment,
    image_grid,
    save_sample_grid,
    shard_or_replicate,
    training_batches,
    validation_batch,
)
from jaxdiff.experiments.procedural import image_side
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.parallel.distributed import gather_to_host
from jaxdiff.training.config import PROCEDURAL_KINDS, TrainConfig, VAEObjective
from jaxdiff.training.objectives import HostParams, Params
from jaxdiff.training.objectives.perceptual import PerceptualModel
from jaxdiff.training.objectives.vae import (
    Frozen,
    is_decoder,
    latent_moments,
    merge_vae_params,
    reconstruct,
    vae_task,
)

SCALE_ESTIMATION_IMAGES = 2048  # training images that estimate the latents' standard deviation
# Config fields that weights do not depend on, and those that the export estimates.
_NON_WEIGHT_FIELDS, _SCALING_FIELDS = (
    {"sample_size", "force_upcast"},
    {"scaling_factor", "shift_factor"},
)


def psnr(images: Float[NDArray, "n h w c"], other: Float[NDArray, "n h w c"]) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], from their mean squared error."""
    error = np.mean((images.astype(np.float64) - other.clip(-1, 1)) ** 2)
    return float(10 * np.log10(4 / error))


def with_scaling_factor(config: TrainConfig, params: HostParams) -> AutoencoderKLConfig:
    """The VAE's config with the scaling factor that gives latents unit variance.

    There is no shift_factor, because StableDiffusionPipeline ignores it.
    """
    model = cast(VAEObjective, config.objective).model
    template = abstract(AutoencoderKL, model)
    moments = jax.jit(lambda params, images: latent_moments(with_params(template, params), images))
    size = 64 if config.data.kind in PROCEDURAL_KINDS else config.batch_size
    stream = training_batches(dataclasses.replace(config, batch_size=size), process_count=1)
    parts = [
        moments(params, next(stream)["image"]) for _ in range(-(-SCALE_ESTIMATION_IMAGES // size))
    ]
    mean, square = np.mean(np.asarray(parts, np.float64), axis=0)
    factor = float(1 / np.sqrt(square - mean**2))
    return dataclasses.replace(model, scaling_factor=factor, shift_factor=None)


def _pretrained_vae(objective: VAEObjective, folder: pathlib.Path) -> Component:
    """The VAE in `folder`, in float32; InputError unless it has the config of `objective`.

    Its scaling may differ where `objective` leaves it out, or where the training changes it.
    """
    found = read_component(folder, dtype=jnp.float32)
    if not isinstance(found.module, AutoencoderKL):
        name = type(found.module).__name__
        raise InputError(f"objective.weights: got {name} in {folder}, expected AutoencoderKL")
    for field in dataclasses.fields(AutoencoderKLConfig):
        expected, got = (getattr(c, field.name) for c in (objective.model, found.module.config))
        if field.name in _SCALING_FIELDS:
            ignored = not objective.freeze_encoder or expected == field.default
        else:
            ignored = field.name in _NON_WEIGHT_FIELDS
        if not ignored and expected != got:
            raise InputError(
                f"objective.model.{field.name}: got {expected}, expected {got} as {folder} has"
            )
    return found


def _with_scaling_of(other: AutoencoderKLConfig, model: AutoencoderKLConfig) -> AutoencoderKLConfig:
    return dataclasses.replace(model, **{name: getattr(other, name) for name in _SCALING_FIELDS})


def _perceptual_model(
    objective: VAEObjective, dtype: Dtype
) -> tuple[PerceptualModel, dict[str, Any]] | None:
    """The perceptual model, and its weights."""
    if objective.perceptual_model is None:
        return None
    module, image_processor = read_vision(
        clip_folder(pathlib.Path(objective.perceptual_model)), dtype=dtype
    )
    return PerceptualModel(module, image_processor), param_dict(module)


def vae_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Sample grids: validation images above their reconstructions; evaluation: PSNR."""
    objective = cast(VAEObjective, config.objective)
    if config.data.kind in PROCEDURAL_KINDS:
        image_side(config.data, objective.model.downscale)
    resumed = has_checkpoint(workdir / CHECKPOINTS)
    pretrained, identity = None, {}
    if objective.weights is not None and (objective.freeze_encoder or not resumed):
        pretrained = _pretrained_vae(objective, pathlib.Path(objective.weights))
    table = {} if pretrained is None else param_dict(pretrained.module)
    kept_config = None
    if pretrained is not None and objective.freeze_encoder:
        model = cast(AutoencoderKL, pretrained.module).config
        objective = dataclasses.replace(objective, model=_with_scaling_of(model, objective.model))
        kept_config = model, pretrained.config
        file = find_weights(pathlib.Path(str(objective.weights)))
        identity = {"weights of the encoder": digest(file)}
    perceptual_model, perceptual_weights = _perceptual_model(objective, dtype) or (None, {})
    encoder = {k: v for k, v in table.items() if objective.freeze_encoder and not is_decoder(k)}
    frozen = Frozen(encoder=encoder, perceptual=perceptual_weights)
    images = validation_batch(config)["image"]
    template = abstract(AutoencoderKL, objective.model, dtype=dtype)

    @jax.jit
    def run_vae(params: Params, frozen: Frozen, images: Array) -> Array:
        return reconstruct(
            with_params(template, merge_vae_params(objective, params, frozen)), images
        )

    def sample(step: int, params: Params) -> Mapping[str, float]:
        reconstructed = gather_to_host(
            run_vae(params, frozen, shard_or_replicate({"image": images})["image"])
        )
        pairs = np.concatenate([images[:GRID_SIZE], reconstructed[:GRID_SIZE]])
        save_sample_grid(workdir, step, image_grid(pairs, len(pairs) // 2))
        return {"validation_psnr": psnr(images, reconstructed)}

    def export(params: HostParams, folder: pathlib.Path) -> None:
        vae_params = merge_vae_params(objective, params, frozen)
        # A frozen encoder keeps its scaling factor.
        model, raw = (
            kept_config
            if kept_config is not None
            else (with_scaling_factor(config, vae_params), {})
        )
        module = with_params(abstract(AutoencoderKL, model), vae_params)
        write_component(folder, Component(module=module, config=raw))

    task = vae_task(
        objective,
        dtype,
        pretrained=gather_to_host(table) or None,
        perceptual_model=perceptual_model,
    )
    return Experiment(task, frozen, training_batches(config), sample, export, identity)
