"""A training in its workdir: its state, and the loop with logging and checkpoints."""

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
from jaxdiff.experiments.experiment import EMA_SNAPSHOTS, Experiment, sample_grid_path
from jaxdiff.experiments.loggers import MetricLoggers
from jaxdiff.experiments.terminal import Terminal
from jaxdiff.parallel.distributed import gather_to_host, is_first
from jaxdiff.parallel.hardware import peak_flops
from jaxdiff.parallel.memory import memory_use
from jaxdiff.parallel.mesh import device_put_global, make_mesh, replicated, shard_batch
from jaxdiff.profiling.flops import gradient_flops
from jaxdiff.training import ema, loop
from jaxdiff.training.config import (
    MeshConfig,
    TrainConfig,
)
from jaxdiff.training.prefetch import Batch, Prefetch
from jaxdiff.training.program import make_program
from jaxdiff.training.state import CheckpointState, TrainState


def mesh_from_config(config: MeshConfig) -> Mesh:
    """The mesh over all devices; InputError unless their number fits."""
    return make_mesh(config.data, config.fsdp, config.tensor)


class Trainer:
    """A training in its workdir, new or restored from the newest checkpoint."""

    def __init__(
        self,
        config: TrainConfig,
        workdir: pathlib.Path,
        store: TrainingStore,
        experiment: Experiment,
    ) -> None:
        self.config, self.workdir, self.store, self.experiment = config, workdir, store, experiment
        self.mesh = mesh_from_config(config.mesh)
        task = experiment.wiring.task
        self.program = make_program(config, task, experiment.wiring.frozen, self.mesh)
        shardings = self.program.state_shardings
        template = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.program.state_shapes,
            shardings,
        )
        base_key = jax.random.key(config.seed)
        restored = store.restore(CheckpointState(*template))
        self.resumed = restored is not None
        if restored is None:
            sharding = shardings.params
            params = {
                path: device_put_global(array, sharding[path])
                for path, array in task.init(config.seed)
            }
            self.state: TrainState = jax.jit(self.program.init, out_shardings=shardings)(params)
        else:
            self.state = TrainState(*restored.state)
            self.experiment.batches.set_state(restored.host["data"])
            base_key = jax.random.wrap_key_data(jnp.asarray(restored.host["base"], jnp.uint32))
        data = device_put_global(jax.random.key_data(base_key), replicated(self.mesh))
        self.base_key = jax.random.wrap_key_data(data)
        self.step = 0 if restored is None else restored.step
        self.peak_flops, self.flops = peak_flops(), cast(float | None, None)
        self.snapshots = EMASnapshots(workdir / EMA_SNAPSHOTS)
        if not store.read_only:
            self.snapshots.drop_after(self.step)

    def save(self, step: int, state: TrainState, position: Any) -> None:
        """Write a checkpoint."""
        base_key = np.asarray(jax.random.key_data(self.base_key)).tolist()
        self.store.save(step, CheckpointState(*state), {"data": position, "base": base_key})

    def train(self, terminal: Terminal, stop: Callable[[], bool]) -> None:
        """Train to the last step."""
        config, program = self.config, self.program
        frozen = self.experiment.load_frozen(program.frozen_shardings)
        with (
            self._logs(terminal) as log,
            Prefetch(self.experiment.batches, self._to_devices) as prefetched,
        ):
            self.state = loop.train(
                program.step,
                self.state,
                frozen,
                prefetched,
                self.base_key,
                intervals=loop.Intervals(
                    steps=config.steps,
                    log=config.log_every,
                    checkpoint=config.checkpoint_every,
                    sample=config.sample_every,
                    snapshot=config.ema.snapshot_every,
                    max_nonfinite_steps=config.max_nonfinite_steps,
                ),
                images_per_step=config.batch_size,
                hooks=loop.Hooks(
                    save=self.save,
                    snapshot=lambda step, state: self.snapshots.save(step, state.power_ema),
                    log=log,
                    sample=lambda step, state: self.experiment.sample(step, state.ema, frozen),
                    progress=terminal.step,
                    stop=stop,
                ),
            )

    def _to_devices(self, batch: Batch) -> dict[str, jax.Array]:
        """A batch on the devices; FLOPs are counted once, if the devices' peak is known."""
        placed = shard_batch(batch, self.mesh)
        if self.flops is None:
            self.flops = self._count_flops(placed) if self.peak_flops else 0.0
        return placed

    def _count_flops(self, batch: dict[str, jax.Array]) -> float:
        task, frozen, _ = self.experiment.wiring
        try:
            return gradient_flops(task.loss, task.shapes, frozen, batch, self.base_key)
        except NotImplementedError:  # a loop of unknown length
            return 0.0

    def _utilisation(self, values: Mapping[str, float]) -> dict[str, float]:
        """`mfu`: the model's FLOPs as a share of the devices' peak (2204.02311, appendix B)."""
        if not self.flops or not self.peak_flops or "step_ms" not in values:
            return {}
        return {"mfu": self.flops / (values["step_ms"] / 1e3) / self.peak_flops}

    @contextmanager
    def _logs(self, terminal: Terminal) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """The function that logs the values of a step."""
        logs = MetricLoggers(self.config, self.workdir, step=self.step) if is_first() else None

        def log(step: int, values: Mapping[str, float]) -> None:
            self.store.check()  # report a full disk now, not at the next checkpoint
            values = {
                **values,
                **self.experiment.batches.counts(),
                **memory_use(),
                **self._utilisation(values),
            }
            image = sample_grid_path(self.workdir, step)
            if logs is not None:
                logs(step, values, image if image.exists() else None)
            terminal.values(step, values)

        with logs or nullcontext():
            yield log

    def export(self, std: float | None = None) -> pathlib.Path:
        """Export averaged weights: the EMA, or a power-function EMA of `std`."""
        averaged = self.state.ema if std is None else self._post_hoc_ema(std)
        folder, averaged = self.workdir / "export", gather_to_host(averaged)
        if is_first():
            self.experiment.export(averaged, folder)
        return folder

    def _post_hoc_ema(self, std: float) -> PyTree:
        """The power-function EMA of this std, from snapshots (post-hoc EMA)."""
        stds = self.config.ema.power_stds
        in_range("ema_std", std, 0.001, 0.28)
        steps = [step for step in self.snapshots.steps() if step <= self.step]
        if not stds or not steps:
            raise InputError(
                f"ema_std: got {std} for {self.workdir} without snapshots of averages, "
                "expected a training with ema.power_stds and ema.snapshot_every"
            )
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            self.state.power_ema,
        )
        snapshots = [(step, snapshot_std) for step in steps for snapshot_std in stds]
        coefficients = ema.post_hoc_coefficients(snapshots, steps[-1], std).reshape(
            len(steps), len(stds)
        )
        total = jax.tree.map(jnp.zeros_like, self.state.ema)
        for step, row in zip(steps, coefficients.tolist(), strict=True):
            found = self.snapshots.restore(step, template)
            for snapshot_std, coefficient in zip(stds, row, strict=True):
                total = jax.tree.map(
                    lambda a, b, f=coefficient: a + f * b, total, found[str(snapshot_std)]
                )
        return total
