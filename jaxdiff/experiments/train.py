"""Trainings in their workdirs: start or resume, export."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

from rich.console import Console

from jaxdiff.checkpoints.training_state import TrainingStore, has_checkpoint
from jaxdiff.core.aliases import rename_arguments
from jaxdiff.core.errors import InputError, WriteError
from jaxdiff.core.shutdown import SHUTDOWN_REQUESTED, stop_signals
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
from jaxdiff.experiments.loggers import Terminal, import_wandb
from jaxdiff.experiments.trainer import Callback, Trainer, check_ema_std, mesh_from_config
from jaxdiff.experiments.vae import vae_experiment, wire_vae
from jaxdiff.experiments.workdir import check_identity, lock_workdir, write_config
from jaxdiff.parallel.distributed import consensus, is_first
from jaxdiff.parallel.mesh import check_batch_size
from jaxdiff.pipeline import cache
from jaxdiff.training.config import (
    ClassifierObjective,
    CLIPObjective,
    DiffusionObjective,
    DistillationObjective,
    TrainConfig,
    VAEObjective,
    resume_identity,
)
from jaxdiff.training.loop import StoppedError

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


def experiment(config: TrainConfig, workdir: str | pathlib.Path) -> Experiment:
    """The experiment of the config's objective; weights are read once it trains or exports."""
    check_data_kind(config)
    return KINDS[type(config.objective)][1](config, pathlib.Path(workdir), dtype_of(config.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training has made."""

    export: pathlib.Path  # folder of the exported weights
    step: int  # of these weights
    metrics: Mapping[str, float]  # of the last line of the log; empty if no step was made


class SaveError(RuntimeError):
    """A checkpoint, log or sample grid could not be written; the message says which and why."""


@rename_arguments
def train(
    config: TrainConfig,
    workdir: str | pathlib.Path,
    *,
    export_only: bool = False,
    ema_std: float | None = None,
    progress: bool = True,
    callback: Callback = lambda step, metrics: None,
) -> TrainResult:
    """Start or resume the training in `workdir` and export its EMA weights.

    With `export_only` only export the newest checkpoint; with `ema_std` the power-function EMA of
    this relative std. `progress` shows the steps on stderr, and `callback` gets the values of each
    line of the log. SIGINT and SIGTERM, in the main thread, save the state and raise StoppedError.
    Raises NonFiniteError, SaveError, and InputError before the workdir is touched. The same call
    resumes after each of them.
    """
    if not isinstance(config, TrainConfig):
        raise InputError(f"config: got {config!r:.60}, expected a TrainConfig")
    cache.enable()
    workdir = pathlib.Path(workdir)
    checkpoints = workdir / CHECKPOINTS
    check_batch_size(
        config.batch_size // config.gradient_accumulation_steps, mesh_from_config(config.mesh)
    )
    if ema_std is not None:
        check_ema_std(ema_std, bool(config.ema.power_stds), workdir)
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
            _train_until_stopped(trainer, progress, callback)
    folder = trainer.export(ema_std)
    return TrainResult(export=folder, step=int(trainer.state.step), metrics=trainer.metrics)


def _train_until_stopped(trainer: Trainer, progress: bool, callback: Callback) -> None:
    """Train to the last step, or until a signal; then all checkpoints are on disk."""
    console = Console(stderr=True, quiet=not (progress and is_first()))
    terminal = Terminal(start=trainer.step, steps=trainer.config.steps, console=console)
    with stop_signals() as received, terminal:
        if trainer.resumed:
            terminal.message(f"train: resuming after step {trainer.step} of {trainer.config.steps}")
        elif not console.is_terminal:  # there the bar says so
            terminal.message(f"train: compiling, then {trainer.config.steps} steps")
        try:
            try:
                trainer.train(terminal, consensus(SHUTDOWN_REQUESTED.is_set), callback)
            finally:
                trainer.store.wait()
        except StoppedError as stopped:
            stopped.signal = received[0] if received else None
            raise
        except WriteError as error:  # the disk is full or gone
            raise SaveError(str(error)) from None
