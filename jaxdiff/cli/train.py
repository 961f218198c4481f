"""`train.py CONFIG --workdir FOLDER [--any.field value]`: start or resume a training.

With `--plan TOPOLOGY` the training step is compiled for absent devices: see `planning`.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from jaxdiff.checkpoints.training_state import TrainingStore, has_checkpoint
from jaxdiff.cli.main import report
from jaxdiff.core.aliases import rename_options
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
from jaxdiff.experiments.workdir import check_identity, lock_workdir, read_config, write_config
from jaxdiff.parallel.distributed import (
    DistributedConfig,
    abort_peers_on_error,
    all_agree,
    gather_to_host,
    initialize,
    is_first,
)
from jaxdiff.parallel.mesh import check_batch_size
from jaxdiff.pipeline import cache
from jaxdiff.training.config import (
    ClassifierObjective,
    CLIPObjective,
    DiffusionObjective,
    DistillationObjective,
    MeshConfig,
    TrainConfig,
    VAEObjective,
    resume_identity,
)
from jaxdiff.training.config.aliases import new_option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command line."""

    config: TrainConfig
    workdir: pathlib.Path
    export_only: bool
    ema_std: float | None
    job: DistributedConfig


Workdir = Annotated[
    pathlib.Path,
    tyro.conf.arg(help="folder for checkpoints, log, samples and export; the same command resumes"),
]
ExportOnly = Annotated[bool, tyro.conf.arg(help="only export the newest checkpoint")]
EMAStd = Annotated[
    float | None,
    tyro.conf.arg(help="export the power-function EMA of this relative std (ema.power_stds)"),
]
# The fields of the config get no prefix of their own: --steps, --optimiser.learning-rate.
Fields = Annotated[TrainConfig, tyro.conf.arg(name="")]


def load_config(path: pathlib.Path) -> TrainConfig:
    """The `config` that the Python file at `path` defines."""
    if not path.is_file():
        raise InputError(
            f"config: got {path}, expected an existing Python file such as configs/scenes_vae.py"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"config: got {path}, expected a file name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        raise InputError(f"{path}: got {type(config).__name__}, expected config = TrainConfig(...)")
    return config


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line; prints help or usage errors and exits (2) like argparse."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: train.py CONFIG --workdir FOLDER [--any.field value ...]", file=sys.stderr)
        print("       train.py CONFIG --plan TOPOLOGY ... [--any.field value]", file=sys.stderr)
        print("       train.py CONFIG --help lists every field", file=sys.stderr)
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    given = load_config(pathlib.Path(arguments[0]))

    def options(
        *,
        workdir: Workdir,
        export_only: ExportOnly = False,
        ema_std: EMAStd = None,
        job: Annotated[DistributedConfig, tyro.conf.arg(name="")] = DistributedConfig(),  # noqa: B008 - it is frozen
        config: Fields = given,
    ) -> Options:
        return Options(
            config=config, workdir=workdir, export_only=export_only, ema_std=ema_std, job=job
        )

    return tyro.cli(
        options,
        prog=f"train.py {arguments[0]}",
        description="Start or resume a training.",
        args=rename_options(arguments[1:], new_option),
        config=(tyro.conf.AvoidSubcommands,),
    )


def plan(arguments: Sequence[str]) -> None:
    """Print the plans of `CONFIG --plan TOPOLOGY ...`."""
    given = load_config(pathlib.Path(arguments[0]))

    def options(
        *,
        plan: Annotated[
            tuple[str, ...], tyro.conf.arg(help="topologies such as v5p:4x4x4 or h200:8")
        ],
        find_max_batch: Annotated[
            bool, tyro.conf.arg(help="also find the largest batch that fits")
        ] = True,
        json: Annotated[bool, tyro.conf.arg(help="print one JSON object")] = False,
        config: Fields = given,
    ) -> None:
        from jaxdiff.cli.plan import plan_training

        plan_training(config, plan, largest=find_max_batch, as_json=json)

    tyro.cli(
        options,
        prog=f"train.py {arguments[0]}",
        description="Compile the training step for absent TPUs or GPUs; report memory and time.",
        args=rename_options(arguments[1:], new_option),
        config=(tyro.conf.AvoidSubcommands,),
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


def write_export(workdir: pathlib.Path, folder: pathlib.Path, *, ema: bool) -> None:
    """Write what a training in `workdir` has learnt so far, averaged or as it is, into `folder`.

    On any number of devices. Raises InputError where something that it was made of has changed.
    """
    config = dataclasses.replace(read_config(workdir), mesh=MeshConfig())
    parts = experiment(config, workdir)
    check_identity(resume_identity(config) | dict(parts.identity), workdir)
    with TrainingStore(workdir / CHECKPOINTS, read_only=True) as store:
        trainer = Trainer(config, workdir, store, parts)
    parts.batches.close()
    parts.export(gather_to_host(trainer.state.ema if ema else trainer.state.params), folder)


def run(arguments: Sequence[str]) -> None:
    """The command. After SIGINT or SIGTERM SystemExit with 130 or 0, once the state is saved."""
    if "--plan" in arguments[1:]:
        plan(arguments)
        return
    options = parse(arguments)
    initialize(options.job)
    with abort_peers_on_error(functools.partial(report, "train")):
        _train(options)


def _train(options: Options) -> None:
    workdir = options.workdir
    cache.enable()
    config, checkpoints = options.config, workdir / CHECKPOINTS
    # Raise errors before the workdir is touched.
    check_batch_size(
        config.batch_size // config.gradient_accumulation_steps, mesh_from_config(config.mesh)
    )
    if config.wandb is not None:
        import_wandb()
    if options.export_only and not has_checkpoint(checkpoints):
        raise InputError(f"workdir: got {workdir} without a checkpoint, expected one to export")
    check_identity(resume_identity(config), workdir)
    parts = experiment(config, workdir)
    now = resume_identity(config) | dict(parts.identity) | dict(parts.batches.identity)
    check_identity(now, workdir)
    if options.export_only:
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
    folder = trainer.export(options.ema_std)
    if is_first():
        print(f"train: exported to {folder}", file=sys.stderr)
    all_agree(True)  # the others wait here, as long as it takes to write
