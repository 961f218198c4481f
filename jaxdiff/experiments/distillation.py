"""Guidance distillation: the UNet of a pipeline gets the guidance scale as an input."""

import dataclasses
import pathlib
from typing import NamedTuple, cast

import jax

from jaxdiff.checkpoints.components import Component
from jaxdiff.checkpoints.loading import host_memory
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype
from jaxdiff.experiments.base_model import (
    BaseModel,
    caption_shapes,
    frozen_shapes,
    load_base_model,
    place_frozen,
    size_shapes,
)
from jaxdiff.experiments.experiment import (
    FILES,
    GRID_SIZE,
    Experiment,
    ModelSource,
    Samples,
    Wiring,
    grid_prompts,
    image_grid,
    image_shapes,
    shard_or_replicate,
    training_batches,
    validation_batch,
)
from jaxdiff.experiments.sample_grid import make_sampler, sampling_inputs
from jaxdiff.models.build import with_params
from jaxdiff.parallel.distributed import gather_to_host
from jaxdiff.training.config import (
    PROCEDURAL_KINDS,
    DiffusionObjective,
    DistillationObjective,
    TrainConfig,
)
from jaxdiff.training.objectives.diffusion import Frozen, LatentDiffusion, train_denoiser
from jaxdiff.training.objectives.distillation import distillation_task, student_model
from jaxdiff.training.step import HostParams, Params


class _Models(NamedTuple):
    teacher: BaseModel
    student: LatentDiffusion
    wiring: Wiring


def wire_distillation(config: TrainConfig, dtype: Dtype, models: ModelSource) -> Wiring:
    """The student's training as shapes."""
    return _wire(config, dtype, models).wiring


def _wire(config: TrainConfig, dtype: Dtype, models: ModelSource) -> _Models:
    objective = cast(DistillationObjective, config.objective)
    teacher_objective = DiffusionObjective(pipeline=objective.teacher)
    base = load_base_model(teacher_objective, models, field="objective.teacher")
    family, networks = base.family, base.abstract_networks(dtype)
    if family.enlarges:
        raise InputError(
            "objective.teacher: got a network that enlarges images, expected one that generates "
            "them from text"
        )
    prediction_type = base.objective.prediction_type
    teacher = LatentDiffusion(train_denoiser(family, networks), prediction_type)
    student = student_model(
        objective,
        family,
        networks,
        prediction_type,
        pretrained=lambda: {family.network: base.host_weights(family.network)},
    )

    def batch(n: int) -> dict[str, jax.ShapeDtypeStruct]:
        sizes = {} if config.data.kind in PROCEDURAL_KINDS else size_shapes(n)
        return image_shapes(config, n) | caption_shapes(base, n) | sizes

    task = distillation_task(objective, teacher, student, base.objective.schedule)
    return _Models(base, student, Wiring(task, frozen_shapes(base, networks, dtype), batch))


def distillation_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Sample grids of fixed prompts, generated without a null stream."""
    objective = cast(DistillationObjective, config.objective)
    base, model, wiring = _wire(config, dtype, FILES)
    tokenizer, own = base.caption_tokenizer(), base.family.network
    generate = jax.jit(
        make_sampler(
            model,
            base.objective.schedule,
            steps=objective.sample_steps,
            guidance_scale=objective.sample_guidance_scale,
            clipping=base.clipping,
        )
    )
    loss = jax.jit(wiring.task.loss)
    side = cast(int, base.objective.model.sample_size) * base.codec.config.downscale
    inputs = tokenizer(grid_prompts(config)) | sampling_inputs(base, side, GRID_SIZE)
    grid_inputs = shard_or_replicate(inputs)
    batch = shard_or_replicate(validation_batch(config, tokenizer))

    def sample(params: Params, frozen: Frozen) -> Samples:
        images = gather_to_host(generate(params, frozen, grid_inputs))
        _, metrics = loss(params, frozen, batch, jax.random.key(0))
        found = {f"validation_{name}": float(value) for name, value in metrics.items()}
        return Samples(found, image_grid(images, GRID_SIZE // 2))

    def export(params: HostParams, output: pathlib.Path) -> None:
        others = [name for name in base.pipeline.components if name != own]
        stored = base.read(only=others, sharding=host_memory())  # in their dtypes
        student = Component(module=with_params(model.network.module, params))
        write_pipeline(
            output,
            dataclasses.replace(stored, components={**stored.components, own: student}),
        )

    return Experiment(
        wiring,
        lambda shardings: place_frozen(base, dtype, shardings, base.null_ids(tokenizer)),
        training_batches(config, tokenizer),
        sample,
        export,
        {f"weights of {name}": digest for name, digest in base.digests.items()},
    )
