"""A training in its workdir: its state, its step, and what surrounds them."""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff.checkpoints.ema_snapshots import EMASnapshots
from jaxdiff.checkpoints.training_state import TrainingStore
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import PyTree
from jaxdiff.core.validate import in_range
from jaxdiff.experiments.experiment import AVERAGES, Experiment, picture_of
from jaxdiff.experiments.loggers import Logs
from jaxdiff.experiments.terminal import Terminal
from jaxdiff.parallel.distributed import gather_to_host, is_first
from jaxdiff.parallel.hardware import peak_flops
from jaxdiff.parallel.memory import memory_use
from jaxdiff.parallel.mesh import device_put_global, make_mesh, replicated, shard_batch
from jaxdiff.training import ema, loop
from jaxdiff.training.config import (
    MeshConfig,
    TrainConfig,
)
from jaxdiff.training.flops import gradient_flops
from jaxdiff.training.prefetch import Batch, Prefetch
from jaxdiff.training.program import make_program
from jaxdiff.training.state import TrainState


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
        learner = parts.learner
        self.program = make_program(config, learner, parts.frozen, self.mesh)
        places = self.program.state_places
        template = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            self.program.state,
            places,
        )
        base = jax.random.key(config.seed)
        found = store.restore(template)
        self.resumed = found is not None
        if found is None:
            where = places.params
            params = {
                path: device_put_global(array, where[path])
                for path, array in learner.init(config.seed)
            }
            self.state: TrainState = jax.jit(self.program.begin, out_shardings=places)(params)
        else:
            self.state = found.state
            self.experiment.batches.set_state(found.host["data"])
            base = jax.random.wrap_key_data(jnp.asarray(found.host["base"], jnp.uint32))
        data = device_put_global(jax.random.key_data(base), replicated(self.mesh))
        self.base = jax.random.wrap_key_data(data)
        self.step = 0 if found is None else found.step
        self.peak, self.flops = peak_flops(), cast(float | None, None)
        self.snapshots = EMASnapshots(workdir / AVERAGES)
        if not store.read_only:
            self.snapshots.drop_after(self.step)

    def save(self, step: int, state: TrainState, position: Any) -> None:
        """Write a checkpoint."""
        base = np.asarray(jax.random.key_data(self.base)).tolist()
        self.store.save(step, state, {"data": position, "base": base})

    def train(self, terminal: Terminal, stop: Callable[[], bool]) -> None:
        """Train to the last step."""
        config, program = self.config, self.program
        frozen = jax.tree.map(device_put_global, self.experiment.frozen, program.frozen_places)
        with (
            self._logs(terminal) as log,
            Prefetch(self.experiment.batches, self._placed) as ahead,
        ):
            self.state = loop.train(
                program.step,
                self.state,
                frozen,
                ahead,
                self.base,
                intervals=loop.Intervals(
                    steps=config.steps,
                    log=config.log_every,
                    checkpoint=config.checkpoint_every,
                    sample=config.sample_every,
                    snapshot=config.ema.snapshot_every,
                    skipped=config.max_nonfinite_steps,
                ),
                images_per_step=config.batch_size,
                hooks=loop.Hooks(
                    save=self.save,
                    snapshot=lambda step, state: self.snapshots.save(step, state.profiles),
                    log=log,
                    sample=lambda step, state: self.experiment.sample(step, state.ema),
                    progress=terminal.step,
                    stop=stop,
                ),
            )

    def _placed(self, batch: Batch) -> dict[str, jax.Array]:
        """A batch on the devices; its FLOPs are counted once, where their peak is known."""
        placed = shard_batch(batch, self.mesh)
        if self.flops is None:
            self.flops = self._count(placed) if self.peak else 0.0
        return placed

    def _count(self, batch: dict[str, jax.Array]) -> float:
        learner, frozen = self.experiment.learner, self.experiment.frozen
        try:
            return gradient_flops(learner.loss, learner.shapes, frozen, batch, self.base)
        except NotImplementedError:  # a loop of unknown length
            return 0.0

    def _used(self, values: Mapping[str, float]) -> dict[str, float]:
        """`mfu`: the model's FLOPs as a share of the devices' peak (2204.02311, appendix B)."""
        if not self.flops or not self.peak or "step_ms" not in values:
            return {}
        return {"mfu": self.flops / (values["step_ms"] / 1e3) / self.peak}

    @contextmanager
    def _logs(self, terminal: Terminal) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """What receives the values of a step and passes them on."""
        logs = Logs(self.config, self.workdir, step=self.step) if is_first() else None

        def log(step: int, values: Mapping[str, float]) -> None:
            self.store.check()  # a full disk is heard of now, not at the next checkpoint
            values = {
                **values,
                **self.experiment.batches.counts(),
                **memory_use(),
                **self._used(values),
            }
            picture = picture_of(self.workdir, step)
            if logs is not None:
                logs(step, values, picture if picture.exists() else None)
            terminal.values(step, values)

        with logs or nullcontext():
            yield log

    def export(self, width: float | None = None) -> pathlib.Path:
        """Write averaged weights as component folders: the EMA, or a power average of `width`."""
        averaged = self.state.ema if width is None else self._average(width)
        folder, averaged = self.workdir / "export", gather_to_host(averaged)
        if is_first():
            self.experiment.export(averaged, folder)
        return folder

    def _average(self, width: float) -> PyTree:
        """What power averaging with this width would have given, made of the snapshots."""
        widths = self.config.ema.power_stds
        in_range("ema_width", width, 0.001, 0.28)
        steps = [step for step in self.snapshots.steps() if step <= self.step]
        if not widths or not steps:
            raise InputError(
                f"ema_width: got {width} for {self.workdir} without snapshots of averages, "
                "expected a training with ema.power_stds and ema.snapshot_every"
            )
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            self.state.profiles,
        )
        kept = [(step, w) for step in steps for w in widths]
        factors = ema.combination(kept, steps[-1], width).reshape(len(steps), len(widths))
        total = jax.tree.map(jnp.zeros_like, self.state.ema)
        for step, row in zip(steps, factors.tolist(), strict=True):
            found = self.snapshots.restore(step, template)
            for w, factor in zip(widths, row, strict=True):
                total = jax.tree.map(lambda a, b, f=factor: a + f * b, total, found[str(w)])
        return total
