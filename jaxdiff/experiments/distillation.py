"""Guidance distillation: the UNet of a pipeline gets the guidance scale as an input."""

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
    GRID_SIZE,
    Experiment,
    image_grid,
    save_sample_grid,
    shard_or_replicate,
    training_batches,
    validation_batch,
)
from jaxdiff.experiments.sample_grid import (
    SAMPLER,
    SPACING,
    grid_noise,
    grid_prompts,
    make_sampler,
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
from jaxdiff.training.objectives import HostParams, Params
from jaxdiff.training.objectives.distillation import Frozen, distillation_task, student_network


def distillation_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Sample grids of fixed prompts, generated without a null stream."""
    objective = cast(DistillationObjective, config.objective)
    folder = pathlib.Path(objective.teacher)
    pipeline = read_pipeline(folder, dtype)
    teacher = cast(UNet2DConditionModel, pipeline.components["unet"].module)
    vae = cast(AutoencoderKL, pipeline.components["vae"].module)
    text = cast(CLIPTextModel, pipeline.components["text_encoder"].module)
    schedule = NoiseSchedule.from_config(pipeline.scheduler)
    tokenizer = load_tokenizer(folder / "tokenizer")
    (null,) = tokenize(tokenizer, [""])
    frozen = Frozen(param_dict(vae), param_dict(text), param_dict(teacher), jnp.asarray(null))
    task = distillation_task(objective, teacher, vae, text, schedule)
    prediction_type = str(pipeline.scheduler.get("prediction_type", "epsilon"))
    generate = jax.jit(_sampler(objective, teacher, vae, text, schedule, prediction_type))
    loss = jax.jit(task.loss)
    noise = grid_noise(cast(int, teacher.config.sample_size), teacher.config.in_channels)
    grid_inputs = shard_or_replicate({"ids": tokenize(tokenizer, grid_prompts()), "noise": noise})
    batch = shard_or_replicate(validation_batch(config, tokenizer))

    def sample(step: int, params: Params) -> Mapping[str, float]:
        images = gather_to_host(generate(params, frozen, grid_inputs))
        save_sample_grid(workdir, step, image_grid(images, GRID_SIZE // 2))
        _, metrics = loss(params, frozen, batch, jax.random.key(0))
        return {f"validation_{name}": float(value) for name, value in metrics.items()}

    def export(params: HostParams, output: pathlib.Path) -> None:
        stored = read_pipeline(folder)  # in their dtypes
        unet = with_params(student_network(teacher, objective.guidance_embedding_dim), params)
        components = {**stored.components, "unet": Component(module=unet)}
        write_pipeline(output, dataclasses.replace(stored, components=components))

    names = ("vae", "text_encoder", "unet")
    identity = {f"weights of {n}": digest(find_weights(folder / n)) for n in names}
    return Experiment(task, frozen, training_batches(config, tokenizer), sample, export, identity)


def _sampler(
    objective: DistillationObjective,
    teacher: UNet2DConditionModel,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    schedule: NoiseSchedule,
    prediction_type: str,
) -> Callable[..., Array]:
    student, width = (
        student_network(teacher, objective.guidance_embedding_dim),
        objective.guidance_embedding_dim,
    )

    def network(params: Params, x: Array, t: Array, cond: UNetConditioning) -> Array:
        scale = guidance_embedding(jnp.full(len(x), objective.sample_guidance_scale), width)
        return with_params(student, params)(x, t, cond.context, timestep_cond=scale)

    def prepare(
        params: Params, frozen: Frozen, inputs: Mapping[str, Array]
    ) -> tuple[Params, tuple[UNetConditioning, ...], AutoencoderKL]:
        encoder = with_params(text, frozen.text_encoder)
        cond = make_conditioning([encode_text(encoder, inputs["ids"], pooled=False)])
        return params, (cond,), with_params(vae, frozen.vae)

    grid = make_grid(
        schedule, SAMPLER, objective.sample_steps, prediction_type=prediction_type, spacing=SPACING
    )
    return make_sampler(
        network, grid, prepare, rule="none", prediction_type=prediction_type, scale=1.0
    )
