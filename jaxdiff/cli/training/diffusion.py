"""Training the UNet: latents of a frozen VAE, told by a frozen text encoder."""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.components import Component, read_component
from jaxdiff.checkpoints.pipelines import PipelineParts, write_pipeline
from jaxdiff.checkpoints.tokenizers import read_tokenizer
from jaxdiff.checkpoints.training_state import has_checkpoint
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.cli.training.drawing import (
    SAMPLER,
    SPACING,
    make_sampler,
    shown_noise,
    shown_prompts,
)
from jaxdiff.cli.training.evaluation import make_evaluation
from jaxdiff.cli.training.experiment import (
    CHECKPOINTS,
    SHOWN,
    Experiment,
    check_kind,
    grid,
    save_grid,
    spread,
    training_batches,
    validation_batch,
    validation_captions,
)
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, NDArray
from jaxdiff.data.drawing import CANVAS
from jaxdiff.data.latents import read_description
from jaxdiff.data.tokenizer import load_tokenizer, tokenize
from jaxdiff.models.build import abstract, assemble, weights
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.parallel.processes import fetch
from jaxdiff.samplers.registry import make_grid
from jaxdiff.training.config import DataConfig, DiffusionObjective, TrainConfig
from jaxdiff.training.objectives import Params, Whole
from jaxdiff.training.objectives.diffusion import Frozen, diffusion_learner


def scheduler_config(objective: DiffusionObjective) -> dict[str, Any]:
    """The scheduler_config.json that samples as the grids were sampled."""
    return objective.schedule.to_config() | {
        "_class_name": "DDIMScheduler",
        "prediction_type": objective.prediction_type,
        "timestep_spacing": SPACING,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "steps_offset": 1,  # diffusers insists on it; trailing steps do not read it
    }


def _sampler(
    objective: DiffusionObjective, vae: AutoencoderKL, text: CLIPTextModel, dtype: Dtype
) -> Callable[..., Array]:
    unet = abstract(UNet2DConditionModel, objective.model, dtype=dtype)

    def network(params: Params, x: Array, t: Array, context: Array) -> Array:
        return assemble(unet, params)(x, t, context)

    kind, steps = objective.prediction_type, objective.sample_steps
    levels = make_grid(objective.schedule, SAMPLER, steps, kind=kind, spacing=SPACING)
    choices = {"rule": "cfg", "kind": kind, "scale": objective.sample_scale}
    return make_sampler(network, levels, vae, text, **choices)


def _side(data: DataConfig, objective: DiffusionObjective) -> int:
    """Side of the (square) pictures in pixels; InputError if another VAE made the latents."""
    if data.kind == "scenes":
        return CANVAS
    if data.kind != "latents":
        return data.resolution or 0
    folder = pathlib.Path(str(data.path))
    made, own = read_description(folder), digest(find_weights(pathlib.Path(objective.vae)))
    if made.vae != own:
        raise InputError(
            f"data.path: got {folder}, encoded by a VAE with the digest {made.vae}, expected "
            f"{own} as {objective.vae} has"
        )
    return made.resolution


def _check_size(objective: DiffusionObjective, vae: AutoencoderKL, side: int) -> None:
    """InputError unless the UNet is for the latents that the VAE makes of pictures of `side`."""
    model = objective.model
    side, channels = side // vae.config.downscale, vae.config.latent_channels
    for name, wanted in (
        ("sample_size", side),
        ("in_channels", channels),
        ("out_channels", channels),
    ):
        if getattr(model, name) != wanted:
            raise InputError(
                f"objective.model.{name}: got {getattr(model, name)}, expected {wanted} as the "
                f"latents of {objective.vae} have"
            )


def _given_weights(
    folder: str, shapes: Mapping[str, Any]
) -> Callable[[int], Iterator[tuple[str, NDArray]]]:
    """What begins a training with the UNet in `folder`; InputError unless its weights fit."""
    stored = weights(read_component(pathlib.Path(folder)).module)
    for path in sorted(stored.keys() | shapes):
        got, wanted = (table[path].shape if path in table else None for table in (stored, shapes))
        if got != wanted:
            raise InputError(
                f"objective.weights: got {folder} with {path} {got}, "
                f"expected {wanted} as objective.model has"
            )

    def init(seed: int) -> Iterator[tuple[str, NDArray]]:
        del seed  # nothing is drawn
        for path, array in stored.items():
            yield path, np.asarray(array, np.float32)

    return init


def diffusion_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Grids are pictures of fixed prompts; the measure is the loss on validation pictures."""
    objective = cast(DiffusionObjective, config.objective)
    check_kind(config)
    given = pathlib.Path(objective.text_encoder)
    folders = {"vae": pathlib.Path(objective.vae), "text_encoder": given / "text_encoder"}
    parts = {name: read_component(path, dtype=dtype) for name, path in folders.items()}
    vae = cast(AutoencoderKL, parts["vae"].module)
    text = cast(CLIPTextModel, parts["text_encoder"].module)
    _check_size(objective, vae, _side(config.data, objective))
    tokenizer = load_tokenizer(given / "tokenizer")
    (null,) = tokenize(tokenizer, [""])
    frozen = Frozen(vae=weights(vae), text_encoder=weights(text), null=jnp.asarray(null))
    learner = diffusion_learner(objective, vae, text, dtype)
    if objective.weights is not None and not has_checkpoint(workdir / CHECKPOINTS):
        learner = learner._replace(init=_given_weights(objective.weights, learner.shapes))
    draw = jax.jit(_sampler(objective, vae, text, dtype))
    measure = jax.jit(learner.measure)
    scenes = config.data.kind == "scenes"
    prompts = shown_prompts() if scenes else validation_captions(config, SHOWN)
    shown = spread({"ids": tokenize(tokenizer, prompts), "noise": shown_noise(objective.model)})
    held_out = validation_batch(config, tokenizer)
    batch = spread(held_out)
    evaluate = make_evaluation(config, tokenizer, vae, held_out)

    def sample(step: int, params: Params) -> Mapping[str, float]:
        save_grid(workdir, step, grid(fetch(draw(params, frozen, **shown)), SHOWN // 2))
        found = jax.device_get(measure(params, frozen, batch, jax.random.key(0)))
        found |= evaluate(lambda ids, noise: draw(params, frozen, ids=ids, noise=noise))
        return {f"validation_{name}": float(value) for name, value in found.items()}

    def export(params: Whole, folder: pathlib.Path) -> None:
        stored = {name: read_component(path) for name, path in folders.items()}  # in their dtypes
        unet = assemble(abstract(UNet2DConditionModel, objective.model), params)
        whole = PipelineParts(
            components={**stored, "unet": Component(module=unet)},
            scheduler=scheduler_config(objective),
            tokenizers={"tokenizer": read_tokenizer(given / "tokenizer")},
            defaults={
                "guidance_scale": objective.sample_scale,
                "steps": objective.sample_steps,
                "sampler": SAMPLER,
            },
        )
        write_pipeline(folder, whole)

    identity = {f"weights of {k}": digest(find_weights(path)) for k, path in folders.items()}
    return Experiment(
        learner, frozen, training_batches(config, tokenizer), sample, export, identity
    )
