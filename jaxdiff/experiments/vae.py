"""Training the VAE."""

import dataclasses
import functools
import pathlib
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.clip_vision import clip_folder, read_image_processor, vision_of
from jaxdiff.checkpoints.components import CONFIG, Component, read_component, write_component
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.loading import host_memory
from jaxdiff.checkpoints.training_state import has_checkpoint
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.core.errors import InputError, errors_of
from jaxdiff.core.types import Array, Dtype, Float, NDArray
from jaxdiff.experiments.experiment import (
    CHECKPOINTS,
    FILES,
    GRID_SIZE,
    Experiment,
    ModelSource,
    Samples,
    Wiring,
    image_grid,
    image_shapes,
    read_placed,
    shard_or_replicate,
    training_batches,
    validation_batch,
)
from jaxdiff.experiments.procedural import image_side
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.clip import CLIPVisionModel
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.parallel.distributed import gather_to_host
from jaxdiff.parallel.mesh import device_put_global
from jaxdiff.training.config import PROCEDURAL_KINDS, TrainConfig, VAEObjective
from jaxdiff.training.objectives.perceptual import PerceptualModel
from jaxdiff.training.objectives.vae import (
    Frozen,
    is_decoder,
    latent_moments,
    merge_vae_params,
    reconstruct,
    vae_task,
)
from jaxdiff.training.step import HostParams, Params

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


def _check_pretrained(objective: VAEObjective) -> AutoencoderKLConfig:
    """The config of the VAE in objective.weights; InputError unless it is that of `objective`.

    Its scaling may differ where `objective` leaves it out, or where the training changes it.
    """
    folder = pathlib.Path(str(objective.weights))
    with errors_of("objective.weights"):
        found = FILES.component(folder)
    if not isinstance(found, AutoencoderKL):
        name = type(found).__name__
        raise InputError(f"objective.weights: got {name} in {folder}, expected AutoencoderKL")
    for field in dataclasses.fields(AutoencoderKLConfig):
        expected, got = (getattr(c, field.name) for c in (objective.model, found.config))
        if field.name in _SCALING_FIELDS:
            ignored = not objective.freeze_encoder or expected == field.default
        else:
            ignored = field.name in _NON_WEIGHT_FIELDS
        if not ignored and expected != got:
            raise InputError(
                f"objective.model.{field.name}: got {expected}, expected {got} as {folder} has"
            )
    return found.config


def _with_scaling_of(other: AutoencoderKLConfig, model: AutoencoderKLConfig) -> AutoencoderKLConfig:
    return dataclasses.replace(model, **{name: getattr(other, name) for name in _SCALING_FIELDS})


def _perceptual_model(
    objective: VAEObjective, dtype: Dtype, models: ModelSource
) -> PerceptualModel | None:
    """The perceptual model as shapes."""
    if objective.perceptual_model is None:
        return None
    folder = clip_folder(pathlib.Path(objective.perceptual_model))
    with errors_of("objective.perceptual_model"):
        tower = vision_of(models.component(folder), folder)
    config, projected = tower.config, tower.visual_projection is not None
    module = abstract(CLIPVisionModel, config, projected, dtype=dtype, param_dtype=dtype)
    return PerceptualModel(module, read_image_processor(folder, config.image_size))


def wire_vae(config: TrainConfig, dtype: Dtype, models: ModelSource) -> Wiring:
    """The VAE's training as shapes."""
    objective = cast(VAEObjective, config.objective)
    table = param_dict(abstract(AutoencoderKL, objective.model))
    encoder = {k: v for k, v in table.items() if objective.freeze_encoder and not is_decoder(k)}
    perceptual = _perceptual_model(objective, dtype, models)
    frozen = Frozen(
        encoder=encoder, perceptual={} if perceptual is None else param_dict(perceptual.module)
    )
    task = vae_task(
        objective,
        dtype,
        pretrained=None if objective.weights is None else lambda: _read_vae(objective),
        perceptual_model=perceptual,
    )
    return Wiring(task, frozen, functools.partial(image_shapes, config))


def _read_vae(objective: VAEObjective) -> HostParams:
    """The weights in objective.weights, in float32."""
    folder = pathlib.Path(str(objective.weights))
    found = read_component(folder, dtype=jnp.float32, sharding=host_memory())
    return jax.tree.map(np.asarray, param_dict(found.module))


def _load_frozen(objective: VAEObjective, dtype: Dtype, shardings: Frozen) -> Frozen:
    """The weights of a frozen encoder and of the perceptual model, placed."""
    encoder, perceptual = {}, {}
    if shardings.encoder:
        folder = pathlib.Path(str(objective.weights))
        encoder = read_placed(folder, shardings.encoder, jnp.float32)
    if shardings.perceptual:
        folder = clip_folder(pathlib.Path(str(objective.perceptual_model)))
        perceptual = read_placed(folder, shardings.perceptual, dtype)
    on = device_put_global(np.float32(1), shardings.adversarial_on)
    return Frozen(encoder=encoder, perceptual=perceptual, adversarial_on=on)


def vae_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Sample grids: validation images above their reconstructions; evaluation: PSNR."""
    objective = cast(VAEObjective, config.objective)
    if config.data.kind in PROCEDURAL_KINDS:
        image_side(config.data, objective.model.downscale)
    resumed, identity, stored_config = has_checkpoint(workdir / CHECKPOINTS), {}, None
    if objective.weights is not None and (objective.freeze_encoder or not resumed):
        stored, folder = _check_pretrained(objective), pathlib.Path(objective.weights)
        if objective.freeze_encoder:
            model = _with_scaling_of(stored, objective.model)
            objective = dataclasses.replace(objective, model=model)
            stored_config = stored, read_object(folder / CONFIG)
            identity = {"weights of the encoder": digest(find_weights(folder))}
    wiring = wire_vae(dataclasses.replace(config, objective=objective), dtype, FILES)
    images = validation_batch(config)["image"]
    template = abstract(AutoencoderKL, objective.model, dtype=dtype)

    @jax.jit
    def run_vae(params: Params, frozen: Frozen, images: Array) -> Array:
        return reconstruct(
            with_params(template, merge_vae_params(objective, params, frozen)), images
        )

    def sample(params: Params, frozen: Frozen) -> Samples:
        reconstructed = gather_to_host(
            run_vae(params, frozen, shard_or_replicate({"image": images})["image"])
        )
        pairs = np.concatenate([images[:GRID_SIZE], reconstructed[:GRID_SIZE]])
        grid = image_grid(pairs, len(pairs) // 2)
        return Samples({"validation_psnr": psnr(images, reconstructed)}, grid)

    def export(params: HostParams, folder: pathlib.Path) -> None:
        table = _read_vae(objective) if objective.freeze_encoder else {}
        encoder = {path: array for path, array in table.items() if not is_decoder(path)}
        vae_params = merge_vae_params(objective, params, Frozen(encoder=encoder, perceptual={}))
        # A frozen encoder keeps its scaling factor.
        model, raw = (
            stored_config
            if stored_config is not None
            else (with_scaling_factor(config, vae_params), {})
        )
        module = with_params(abstract(AutoencoderKL, model), vae_params)
        write_component(folder, Component(module=module, config=raw))

    return Experiment(
        wiring,
        functools.partial(_load_frozen, objective, dtype),
        training_batches(config),
        sample,
        export,
        identity,
    )
