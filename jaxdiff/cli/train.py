"""`train.py CONFIG --workdir FOLDER [--any.field value]`: train, or go on where it stopped."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from rich.console import Console

from jaxdiff.checkpoints.atomic import new_file
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.training_state import TrainingStore, has_checkpoint
from jaxdiff.cli.training.classifier import classifier_experiment
from jaxdiff.cli.training.clip import clip_experiment
from jaxdiff.cli.training.diffusion import diffusion_experiment
from jaxdiff.cli.training.distillation import distillation_experiment
from jaxdiff.cli.training.experiment import CHECKPOINTS, Experiment
from jaxdiff.cli.training.terminal import Terminal
from jaxdiff.cli.training.vae import vae_experiment
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import dtype_of
from jaxdiff.parallel.mesh import check_batch_size, make_mesh, place, replicated, shard_batch
from jaxdiff.parallel.processes import Agreed, Job, fetch, is_first, join
from jaxdiff.parallel.rules import sharded_like, split_any
from jaxdiff.pipeline import cache
from jaxdiff.training import loop
from jaxdiff.training.config import (
    ClassifierObjective,
    CLIPObjective,
    DiffusionObjective,
    DistillationObjective,
    MeshConfig,
    TrainConfig,
    VAEObjective,
    identity,
)
from jaxdiff.training.log import JsonlLog
from jaxdiff.training.optimiser import learning_rate, optimiser
from jaxdiff.training.prefetch import Prefetch
from jaxdiff.training.state import TrainState, initial_state
from jaxdiff.training.step import compile_step, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a command line asks for."""

    config: TrainConfig
    workdir: pathlib.Path
    export_only: bool
    job: Job


Workdir = Annotated[
    pathlib.Path,
    tyro.conf.arg(help="where checkpoints, log, samples and export go; the same again resumes"),
]
ExportOnly = Annotated[bool, tyro.conf.arg(help="only write the export of the newest checkpoint")]
# The fields of the config get no prefix of their own: --steps, --optimiser.learning-rate.
Fields = Annotated[TrainConfig, tyro.conf.arg(name="")]


def load_config(path: pathlib.Path) -> TrainConfig:
    """The `config` that the Python file at `path` defines."""
    if not path.is_file():
        raise InputError(
            f"config: got {path}, expected a Python file such as configs/scenes_vae.py"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"config: got {path}, expected a file that ends in .py")
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
        print("       train.py CONFIG --help lists every field", file=sys.stderr)
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    given = load_config(pathlib.Path(arguments[0]))

    def options(
        *,
        workdir: Workdir,
        export_only: ExportOnly = False,
        job: Annotated[Job, tyro.conf.arg(name="")] = Job(),  # noqa: B008 - it is frozen
        config: Fields = given,
    ) -> Options:
        return Options(config=config, workdir=workdir, export_only=export_only, job=job)

    return tyro.cli(
        options,
        prog=f"train.py {arguments[0]}",
        description="Train, or go on where training stopped.",
        args=list(arguments[1:]),
        config=(tyro.conf.AvoidSubcommands,),
    )


Identity = Mapping[str, Any]


def check_identity(now: Identity, workdir: pathlib.Path) -> None:
    """InputError if `workdir` has a checkpoint of a training with another identity than `now`."""
    path = workdir / "config.json"
    if not has_checkpoint(workdir / CHECKPOINTS) or not path.exists():
        return
    before = read_object(path).get("identity")
    if not isinstance(before, dict):
        raise InputError(f"{path}: got no identity, expected the config.json of a training")
    now = json.loads(json.dumps(now))
    changed = [
        f"{name}: got {now[name]}, expected {before[name]}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]
    if changed:
        raise InputError(
            f"{'; '.join(changed)} as trained so far "
            f"in {workdir} (take another --workdir for another model)"
        )


def record(config: TrainConfig, now: Identity, workdir: pathlib.Path) -> None:
    """Write `workdir`/config.json."""
    path = workdir / "config.json"
    values = {"identity": now} | dataclasses.asdict(config)
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM; the second of a kind acts as usual."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def mesh_of(config: MeshConfig) -> Mesh:
    """The mesh over all devices; InputError unless they have its sizes."""
    return make_mesh(config.data, config.fsdp, config.tensor)


class Trainer:
    """A training in its workdir: made from scratch, or as its newest checkpoint left it."""

    def __init__(
        self,
        config: TrainConfig,
        workdir: pathlib.Path,
        store: TrainingStore,
        parts: Experiment,
    ) -> None:
        self.config, self.workdir, self.store, self.experiment = config, workdir, store, parts
        self.mesh = mesh_of(config.mesh)
        self.optimiser = optimiser(config.optimiser, config.steps)
        learner = self.experiment.learner
        begin = functools.partial(initial_state, optimiser=self.optimiser)
        shapes = jax.eval_shape(begin, learner.shapes)
        self.shardings: Any = sharded_like(shapes, learner.shapes, learner.rules, self.mesh)
        template = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            self.shardings,
        )
        base = jax.random.key(config.seed)
        found = store.restore(template)
        self.resumed = found is not None
        if found is None:
            where = self.shardings.params
            params = {path: place(array, where[path]) for path, array in learner.init(config.seed)}
            self.state: TrainState = jax.jit(begin, out_shardings=self.shardings)(params)
        else:
            self.state = found.state
            self.experiment.batches.set_state(found.host["data"])
            base = jax.random.wrap_key_data(jnp.asarray(found.host["base"], jnp.uint32))
        data = place(jax.random.key_data(base), replicated(self.mesh))
        self.base = jax.random.wrap_key_data(data)
        self.step = 0 if found is None else found.step

    def save(self, step: int, state: TrainState, position: Any) -> None:
        """Write a checkpoint."""
        base = np.asarray(jax.random.key_data(self.base)).tolist()
        self.store.save(step, state, {"data": position, "base": base})

    def train(self, terminal: Terminal, stop: Callable[[], bool]) -> None:
        """Train to the last step."""
        config, learner = self.config, self.experiment.learner
        log = JsonlLog(self.workdir / "log.jsonl", step=self.step) if is_first() else None

        def record_values(step: int, values: Mapping[str, float]) -> None:
            self.store.check()  # a full disk is heard of now, not at the next checkpoint
            values = {**values, **self.experiment.batches.counts()}
            if log is not None:
                log(step, values)
            terminal.values(step, values)

        pure = make_step(
            learner.loss,
            self.optimiser,
            learning_rate(config.optimiser, config.steps),
            config.ema_decay,
            learner.limit,
            config.accumulate,
        )
        parts = split_any(self.experiment.frozen, self.mesh)
        frozen = jax.tree.map(place, self.experiment.frozen, parts)
        with Prefetch(self.experiment.batches, lambda b: shard_batch(b, self.mesh)) as ahead:
            self.state = loop.train(
                compile_step(pure, self.mesh, self.shardings, parts),
                self.state,
                frozen,
                ahead,
                self.base,
                intervals=loop.Intervals(
                    steps=config.steps,
                    log=config.log_every,
                    checkpoint=config.checkpoint_every,
                    sample=config.sample_every,
                    skipped=config.max_skipped,
                ),
                images_per_step=config.batch_size,
                hooks=loop.Hooks(
                    save=self.save,
                    log=record_values,
                    sample=lambda step, state: self.experiment.sample(step, state.ema),
                    progress=terminal.step,
                    stop=stop,
                ),
            )

    def export(self) -> pathlib.Path:
        """Write the EMA weights as component folders."""
        folder, averaged = self.workdir / "export", fetch(self.state.ema)
        if is_first():
            self.experiment.export(averaged, folder)
        return folder


def experiment(config: TrainConfig, workdir: pathlib.Path) -> Experiment:
    """The objective of `config` wired up."""
    kinds = {
        VAEObjective: vae_experiment,
        CLIPObjective: clip_experiment,
        DiffusionObjective: diffusion_experiment,
        DistillationObjective: distillation_experiment,
        ClassifierObjective: classifier_experiment,
    }
    return kinds[type(config.objective)](config, workdir, dtype_of(config.dtype))


def run(arguments: Sequence[str]) -> None:
    """The command. After SIGINT or SIGTERM SystemExit with 130 or 0, once the state is saved."""
    options = parse(arguments)
    workdir = options.workdir
    join(options.job)
    cache.enable()
    config, checkpoints = options.config, workdir / CHECKPOINTS
    # What can be refused is refused before the workdir is touched.
    check_batch_size(config.batch_size // config.accumulate, mesh_of(config.mesh))
    if options.export_only and not has_checkpoint(checkpoints):
        raise InputError(f"workdir: got {workdir} without a checkpoint, expected one to export")
    check_identity(identity(config), workdir)
    parts = experiment(config, workdir)
    now = identity(config) | dict(parts.identity) | dict(parts.batches.identity)
    check_identity(now, workdir)
    if options.export_only:
        with TrainingStore(checkpoints, read_only=True) as store:
            trainer = Trainer(config, workdir, store, parts)
    else:
        with alone(workdir), TrainingStore(checkpoints, keep=config.keep) as store:
            if is_first():
                record(config, now, workdir)
            trainer = Trainer(config, workdir, store, parts)
            train_until_stopped(trainer)
    folder = trainer.export()
    if is_first():
        print(f"train: exported to {folder}", file=sys.stderr)


@contextmanager
def alone(workdir: pathlib.Path) -> Iterator[None]:
    """Make `workdir` and keep other trainings out of it; InputError if one is there."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not is_first():  # one lock for all processes of a training
            yield
            return
        with filelock.FileLock(workdir / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise InputError(
            f"workdir: got {workdir}, where a training is running, expected another one"
        ) from None
    except FileExistsError:
        raise InputError(f"workdir: got the file {workdir}, expected a folder") from None


def train_until_stopped(trainer: Trainer) -> None:
    """Train to the end; SystemExit says how to go on if that was not reached.

    The code is 0 after SIGTERM: to give way where a machine is taken away is no failure.
    """
    steps = trainer.config.steps
    console = Console(stderr=True, quiet=not is_first())
    shown = Terminal(start=trainer.step, steps=steps, console=console)
    with stop_signals() as received, shown as terminal:
        if trainer.resumed:
            terminal.message(f"train: going on after step {trainer.step} of {steps}")
        try:
            try:
                trainer.train(terminal, Agreed(lambda: bool(received)))
            finally:
                trainer.store.wait()
        except loop.StoppedError as stopped:
            terminal.message(f"train: {stopped}; the same command goes on from there")
            interrupted = signal.SIGINT in received  # here; another process may have been told
            raise SystemExit(128 + signal.SIGINT if interrupted else 0) from None
        except loop.NonFiniteError as error:
            kept = trainer.store.latest()
            terminal.message(
                f"train: {error}; training stopped. The last good checkpoint is of step {kept}: "
                "start again with a lower --optimiser.learning-rate to go on from there"
            )
            raise SystemExit(1) from None
        except OSError as error:  # the disk is full or gone
            kept = trainer.store.latest()
            terminal.message(
                f"train: {error}; training stopped. The last good checkpoint is of step {kept}: "
                "the same command goes on from there"
            )
            raise SystemExit(1) from None
