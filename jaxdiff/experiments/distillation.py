"""Guidance distillation: the UNet of a pipeline gets the guidance scale as an input."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import cast

import jax

from jaxdiff.checkpoints.components import Component
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.core.types import Dtype
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.experiments.experiment import (
    GRID_SIZE,
    Experiment,
    grid_prompts,
    image_grid,
    save_sample_grid,
    shard_or_replicate,
    training_batches,
    validation_batch,
)
from jaxdiff.experiments.sample_grid import make_sampler, sampling_inputs
from jaxdiff.models.build import with_params
from jaxdiff.parallel.distributed import gather_to_host
from jaxdiff.training.config import DiffusionObjective, DistillationObjective, TrainConfig
from jaxdiff.training.objectives import HostParams, Params
from jaxdiff.training.objectives.diffusion import Frozen, LatentDiffusion
from jaxdiff.training.objectives.distillation import distillation_task, student_model
from jaxdiff.training.objectives.trainable import train_denoiser


def distillation_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Sample grids of fixed prompts, generated without a null stream."""
    objective = cast(DistillationObjective, config.objective)
    teacher_objective = DiffusionObjective(pipeline=objective.teacher)
    base = load_base_model(teacher_objective, field="objective.teacher")
    family, tokenizer = base.family, base.caption_tokenizer()
    networks = base.abstract_networks(dtype)
    frozen = Frozen(
        weights={name: base.host_weights(name, dtype) for name in networks},
        null=base.null_ids(tokenizer),
    )
    schedule, prediction_type = base.objective.schedule, base.objective.prediction_type
    teacher = LatentDiffusion(train_denoiser(family, networks), prediction_type)
    model = student_model(
        objective,
        family,
        networks,
        prediction_type,
        pretrained=lambda: {family.network: base.host_weights(family.network)},
    )
    task = distillation_task(objective, teacher, model, schedule)
    generate = jax.jit(
        make_sampler(
            model,
            schedule,
            steps=objective.sample_steps,
            guidance_scale=objective.sample_guidance_scale,
        )
    )
    loss = jax.jit(task.loss)
    side = cast(int, networks[family.network].config.sample_size) * base.vae.config.downscale
    inputs = tokenizer(grid_prompts(config)) | sampling_inputs(base, side, GRID_SIZE)
    grid_inputs = shard_or_replicate(inputs)
    batch = shard_or_replicate(validation_batch(config, tokenizer))

    def sample(step: int, params: Params) -> Mapping[str, float]:
        images = gather_to_host(generate(params, frozen, grid_inputs))
        save_sample_grid(workdir, step, image_grid(images, GRID_SIZE // 2))
        _, metrics = loss(params, frozen, batch, jax.random.key(0))
        return {f"validation_{name}": float(value) for name, value in metrics.items()}

    def export(params: HostParams, output: pathlib.Path) -> None:
        stored = base.reload()  # in their dtypes
        student = Component(module=with_params(model.network.module, params))
        components = {**stored.components, family.network: student}
        write_pipeline(output, dataclasses.replace(stored, components=components))

    identity = {f"weights of {name}": digest for name, digest in base.digests.items()}
    return Experiment(task, frozen, training_batches(config, tokenizer), sample, export, identity)
