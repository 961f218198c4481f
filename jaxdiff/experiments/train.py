"""Trainings in their workdirs: start or resume, export."""

import pathlib

from jaxdiff.checkpoints.training_state import TrainingStore, has_checkpoint
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import dtype_of
from jaxdiff.experiments.classifier import classifier_experiment
from jaxdiff.experiments.clip import clip_experiment
from jaxdiff.experiments.diffusion import diffusion_experiment
from jaxdiff.experiments.distillation import distillation_experiment
from jaxdiff.experiments.experiment import CHECKPOINTS, Experiment
from jaxdiff.experiments.loggers import import_wandb
from jaxdiff.experiments.preemption import train_until_stopped
from jaxdiff.experiments.trainer import Trainer, mesh_from_config
from jaxdiff.experiments.vae import vae_experiment
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


def experiment(config: TrainConfig, workdir: pathlib.Path) -> Experiment:
    """The experiment of the config's objective."""
    kinds = {
        VAEObjective: vae_experiment,
        CLIPObjective: clip_experiment,
        DiffusionObjective: diffusion_experiment,
        DistillationObjective: distillation_experiment,
        ClassifierObjective: classifier_experiment,
    }
    return kinds[type(config.objective)](config, workdir, dtype_of(config.dtype))


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
