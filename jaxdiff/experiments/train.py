"""Trainings in their workdirs: start or resume, export."""

import pathlib
from collections.abc import Callable

from jaxdiff.checkpoints.training_state import TrainingStore, has_checkpoint
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, dtype_of
from jaxdiff.experiments.classifier import classifier_experiment, wire_classifier
from jaxdiff.experiments.clip import clip_experiment, wire_clip
from jaxdiff.experiments.diffusion import diffusion_experiment, wire_diffusion
from jaxdiff.experiments.distillation import distillation_experiment, wire_distillation
from jaxdiff.experiments.experiment import (
    CHECKPOINTS,
    Experiment,
    ModelSource,
    Wiring,
    check_data_kind,
)
from jaxdiff.experiments.loggers import import_wandb
from jaxdiff.experiments.preemption import train_until_stopped
from jaxdiff.experiments.trainer import Trainer, mesh_from_config
from jaxdiff.experiments.vae import vae_experiment, wire_vae
from jaxdiff.experiments.workdir import check_identity, lock_workdir, write_config
from jaxdiff.parallel.distributed import is_first
from jaxdiff.parallel.mesh import check_batch_size
from jaxdiff.training.config import (
    ClassifierObjective,
    CLIPObjective,
    DiffusionObjective,
    DistillationObjective,
    TrainConfig,
    VAEObjective,
    resume_identity,
)

Wire = Callable[[TrainConfig, Dtype, ModelSource], Wiring]
Make = Callable[[TrainConfig, pathlib.Path, Dtype], Experiment]
# By objective: the training as shapes, and as it runs.
KINDS: dict[type, tuple[Wire, Make]] = {
    VAEObjective: (wire_vae, vae_experiment),
    CLIPObjective: (wire_clip, clip_experiment),
    DiffusionObjective: (wire_diffusion, diffusion_experiment),
    DistillationObjective: (wire_distillation, distillation_experiment),
    ClassifierObjective: (wire_classifier, classifier_experiment),
}


def wire(config: TrainConfig, models: ModelSource) -> Wiring:
    """The training of the config's objective as shapes; no weights are read. Raises InputError."""
    check_data_kind(config)
    return KINDS[type(config.objective)][0](config, dtype_of(config.dtype), models)


def experiment(config: TrainConfig, workdir: pathlib.Path) -> Experiment:
    """The experiment of the config's objective; weights are read once it trains or exports."""
    check_data_kind(config)
    return KINDS[type(config.objective)][1](config, workdir, dtype_of(config.dtype))


def train(
    config: TrainConfig,
    workdir: pathlib.Path,
    *,
    export_only: bool = False,
    ema_std: float | None = None,
) -> pathlib.Path:
    """Start or resume the training in `workdir`, export it, and return the folder of the export.

    With `export_only` only export the newest checkpoint; with `ema_std` the power-function EMA of
    this relative std. After SIGINT or SIGTERM SystemExit with 130 or 0, once the state is saved.
    Raises InputError before the workdir is touched.
    """
    checkpoints = workdir / CHECKPOINTS
    check_batch_size(
        config.batch_size // config.gradient_accumulation_steps, mesh_from_config(config.mesh)
    )
    if config.wandb is not None:
        import_wandb()
    if export_only and not has_checkpoint(checkpoints):
        raise InputError(f"workdir: got {workdir} without a checkpoint, expected one to export")
    check_identity(resume_identity(config), workdir)
    parts = experiment(config, workdir)
    now = resume_identity(config) | dict(parts.identity) | dict(parts.batches.identity)
    check_identity(now, workdir)
    if export_only:
        with TrainingStore(checkpoints, read_only=True) as store:
            trainer = Trainer(config, workdir, store, parts)
    else:
        with (
            lock_workdir(workdir),
            TrainingStore(checkpoints, keep=config.max_checkpoints) as store,
        ):
            if is_first():
                write_config(config, now, workdir)
            trainer = Trainer(config, workdir, store, parts)
            train_until_stopped(trainer)
    return trainer.export(ema_std)
