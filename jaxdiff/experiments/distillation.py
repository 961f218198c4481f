"""Teaching the UNet of a pipeline to take the guidance scale as an input."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp

from jaxdiff.checkpoints.components import Component
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.core.types import Array, Dtype
from jaxdiff.data.tokenizer import load_tokenizer, tokenize
from jaxdiff.diffusion.schedules import NoiseSchedule
from jaxdiff.experiments.experiment import (
    SHOWN,
    Experiment,
    grid,
    save_grid,
    spread,
    training_batches,
    validation_batch,
)
from jaxdiff.experiments.sample_grid import (
    SAMPLER,
    SPACING,
    make_sampler,
    shown_noise,
    shown_prompts,
)
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.conditioning import UNetConditioning, encode_text, make_conditioning
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.nn.embeddings import guidance_embedding
from jaxdiff.parallel.distributed import gather_to_host
from jaxdiff.samplers.registry import make_grid
from jaxdiff.training.config import DistillationObjective, TrainConfig
from jaxdiff.training.objectives import Params, Whole
from jaxdiff.training.objectives.distillation import Frozen, distillation_learner, student


def distillation_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Grids are pictures of fixed prompts, drawn without a null stream."""
    objective = cast(DistillationObjective, config.objective)
    folder = pathlib.Path(objective.teacher)
    parts = read_pipeline(folder, dtype)
    teacher = cast(UNet2DConditionModel, parts.components["unet"].module)
    vae = cast(AutoencoderKL, parts.components["vae"].module)
    text = cast(CLIPTextModel, parts.components["text_encoder"].module)
    schedule = NoiseSchedule.from_config(parts.scheduler)
    tokenizer = load_tokenizer(folder / "tokenizer")
    (null,) = tokenize(tokenizer, [""])
    frozen = Frozen(param_dict(vae), param_dict(text), param_dict(teacher), jnp.asarray(null))
    learner = distillation_learner(objective, teacher, vae, text, schedule)
    kind = str(parts.scheduler.get("prediction_type", "epsilon"))
    draw = jax.jit(_sampler(objective, teacher, vae, text, schedule, kind))
    measure = jax.jit(learner.loss)
    noise = shown_noise(cast(int, teacher.config.sample_size), teacher.config.in_channels)
    shown = spread({"ids": tokenize(tokenizer, shown_prompts()), "noise": noise})
    batch = spread(validation_batch(config, tokenizer))

    def sample(step: int, params: Params) -> Mapping[str, float]:
        pictures = gather_to_host(draw(params, frozen, shown))
        save_grid(workdir, step, grid(pictures, SHOWN // 2))
        _, measures = measure(params, frozen, batch, jax.random.key(0))
        return {f"validation_{name}": float(value) for name, value in measures.items()}

    def export(params: Whole, output: pathlib.Path) -> None:
        stored = read_pipeline(folder)  # in their dtypes
        unet = with_params(student(teacher, objective.guidance_embedding_dim), params)
        components = {**stored.components, "unet": Component(module=unet)}
        write_pipeline(output, dataclasses.replace(stored, components=components))

    names = ("vae", "text_encoder", "unet")
    identity = {f"weights of {n}": digest(find_weights(folder / n)) for n in names}
    return Experiment(
        learner, frozen, training_batches(config, tokenizer), sample, export, identity
    )


def _sampler(
    objective: DistillationObjective,
    teacher: UNet2DConditionModel,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    schedule: NoiseSchedule,
    kind: str,
) -> Callable[..., Array]:
    learnt, width = (
        student(teacher, objective.guidance_embedding_dim),
        objective.guidance_embedding_dim,
    )

    def network(params: Params, x: Array, t: Array, told: UNetConditioning) -> Array:
        scale = guidance_embedding(jnp.full(len(x), objective.sample_guidance_scale), width)
        return with_params(learnt, params)(x, t, told.context, timestep_cond=scale)

    def prepare(
        params: Params, frozen: Frozen, shown: Mapping[str, Array]
    ) -> tuple[Params, tuple[UNetConditioning, ...], AutoencoderKL]:
        read = with_params(text, frozen.text_encoder)
        told = make_conditioning([encode_text(read, shown["ids"], pooled=False)])
        return params, (told,), with_params(vae, frozen.vae)

    levels = make_grid(
        schedule, SAMPLER, objective.sample_steps, prediction_type=kind, spacing=SPACING
    )
    return make_sampler(network, levels, prepare, rule="none", kind=kind, scale=1.0)
