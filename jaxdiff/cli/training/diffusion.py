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
from jaxdiff.cli.training.experiment import (
    CHECKPOINTS,
    SHOWN,
    Experiment,
    grid,
    save_grid,
    spread,
    training_batches,
    validation_batch,
)
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float, Int, NDArray
from jaxdiff.data.drawing import CANVAS
from jaxdiff.data.scenes import sample_prompts
from jaxdiff.data.tokenizer import load_tokenizer, tokenize
from jaxdiff.guidance.denoiser import guided, stack_streams
from jaxdiff.guidance.registry import RULES
from jaxdiff.guidance.rule import Dials
from jaxdiff.models.build import abstract, assemble, weights
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.unet_config import UNet2DConditionConfig
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.samplers.loop import sample as run_sampler
from jaxdiff.samplers.noise import image_keys, initial_noise
from jaxdiff.samplers.registry import SAMPLERS, make_grid
from jaxdiff.training.config import DiffusionObjective, TrainConfig
from jaxdiff.training.objectives import Params
from jaxdiff.training.objectives.diffusion import Frozen, diffusion_learner

SAMPLER, SPACING = "ddim", "trailing"  # of the grids


def shown_prompts() -> list[str]:
    """The fixed prompts of the grids: half with one thing, half with two, none trained on."""
    half = SHOWN // 2
    kinds = (sample_prompts(half, 0, kind) for kind in ("one", "two"))
    return [prompt.text for prompts in kinds for prompt in prompts]


def shown_noise(model: UNet2DConditionConfig) -> Float[NDArray, "b h w c"]:
    """What the pictures of the grids start from: image i has seed i."""
    side, channels = cast(int, model.sample_size), model.in_channels
    return np.asarray(initial_noise(image_keys(range(SHOWN)), (side, side, channels)))


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


def make_sampler(
    objective: DiffusionObjective, vae: AutoencoderKL, text: CLIPTextModel, dtype: Dtype
) -> Callable[[Params, Frozen, Array, Array], Array]:
    """The function (UNet weights, frozen, ids, noise) -> pictures in [-1, 1]."""
    unet = abstract(UNet2DConditionModel, objective.model, dtype=dtype)
    kind = objective.prediction_type
    levels = make_grid(
        objective.schedule, SAMPLER, objective.sample_steps, kind=kind, spacing=SPACING
    )

    def network(params: Params, x: Array, t: Array, context: Array) -> Array:
        return assemble(unet, params)(x, t, context)

    def draw(
        params: Params, frozen: Frozen, ids: Int[Array, "b n"], noise: Float[Array, "b h w z"]
    ) -> Float[Array, "b h2 w2 c"]:
        encode, decoder = assemble(text, frozen.text_encoder), assemble(vae, frozen.vae)
        null = jnp.broadcast_to(encode(frozen.null[None]), (len(ids), *encode_shape(ids, text)))
        denoise = guided(
            network,
            params,
            stack_streams(null, encode(ids)),
            Dials(jnp.full(len(ids), objective.sample_scale, jnp.float32)),
            rule=RULES["cfg"],
            kind=kind,
        )
        keys = image_keys(range(len(ids)))  # DDIM draws nothing
        z = run_sampler(denoise, noise, levels, keys, sampler=SAMPLERS[SAMPLER])
        return decoder.decode(decoder.unscale(z))

    return draw


def encode_shape(ids: Int[Array, "b n"], text: CLIPTextModel) -> tuple[int, int]:
    """(tokens, width) of the hidden states of one caption."""
    return ids.shape[1], text.config.hidden_size


def _check_size(objective: DiffusionObjective, vae: AutoencoderKL) -> None:
    """InputError unless the UNet is for the latents that the VAE makes of scenes."""
    model = objective.model
    side, channels = CANVAS // vae.config.downscale, vae.config.latent_channels
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
    given = pathlib.Path(objective.text_encoder)
    folders = {"vae": pathlib.Path(objective.vae), "text_encoder": given / "text_encoder"}
    parts = {name: read_component(path, dtype=dtype) for name, path in folders.items()}
    vae = cast(AutoencoderKL, parts["vae"].module)
    text = cast(CLIPTextModel, parts["text_encoder"].module)
    _check_size(objective, vae)
    tokenizer = load_tokenizer(given / "tokenizer")
    (null,) = tokenize(tokenizer, [""])
    frozen = Frozen(vae=weights(vae), text_encoder=weights(text), null=jnp.asarray(null))
    learner = diffusion_learner(objective, vae, text, dtype)
    if objective.weights is not None and not has_checkpoint(workdir / CHECKPOINTS):
        learner = learner._replace(init=_given_weights(objective.weights, learner.shapes))
    draw = jax.jit(make_sampler(objective, vae, text, dtype))
    measure = jax.jit(learner.measure)
    shown = spread(
        {"ids": tokenize(tokenizer, shown_prompts()), "noise": shown_noise(objective.model)}
    )
    batch = spread(validation_batch(config, tokenizer))

    def sample(step: int, params: Params) -> Mapping[str, float]:
        save_grid(
            workdir / "samples", step, grid(np.asarray(draw(params, frozen, **shown)), SHOWN // 2)
        )
        found = jax.device_get(measure(params, frozen, batch, jax.random.key(0)))
        return {f"validation_{name}": float(value) for name, value in found.items()}

    def export(params: Params, folder: pathlib.Path) -> None:
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
