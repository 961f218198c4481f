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
from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import PyTree
from jaxdiff.core.validate import in_range
from jaxdiff.experiments.experiment import Experiment
from jaxdiff.experiments.loggers import MetricLoggers, Terminal
from jaxdiff.parallel.chips import peak_flops
from jaxdiff.parallel.distributed import gather_to_host, is_first
from jaxdiff.parallel.mesh import device_put_global, make_mesh, replicated, shard_batch
from jaxdiff.profiling.flops import gradient_flops
from jaxdiff.training import loop, power_ema
from jaxdiff.training.config import (
    MeshConfig,
    TrainConfig,
)
from jaxdiff.training.loop import Batch, Prefetch
from jaxdiff.training.step import CheckpointState, TrainState

EMA_SNAPSHOTS = "averages"  # folder in a workdir
Callback = Callable[[int, Mapping[str, float]], None]  # step, values of a line of the log


def mesh_from_config(config: MeshConfig) -> Mesh:
    """The mesh over all devices; InputError unless their number fits."""
    return make_mesh(config.data, config.fsdp, config.tensor)


def check_ema_std(std: float, has_snapshots: bool, workdir: pathlib.Path) -> None:
    """InputError for a std out of range, or of a training without snapshots of averages."""
    in_range("ema_std", std, 0.001, 0.28)
    if not has_snapshots:
        raise InputError(
            f"ema_std: got {std} for {workdir} without snapshots of averages, "
            "expected a training with ema.power_stds and ema.snapshot_every"
        )


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
        self.program = experiment.wiring.program(config, self.mesh)
        template = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.program.state_shapes,
            self.program.state_shardings,
        )
        base_key = jax.random.key(config.seed)
        restored = store.restore(CheckpointState(*template))
        self.resumed = restored is not None
        if restored is None:
            self.state = self.program.init(config.seed)
        else:
            self.state = TrainState(*restored.state)
            self.experiment.batches.set_state(restored.host["data"])
            base_key = jax.random.wrap_key_data(jnp.asarray(restored.host["base"], jnp.uint32))
        data = device_put_global(jax.random.key_data(base_key), replicated(self.mesh))
        self.base_key = jax.random.wrap_key_data(data)
        self.step = 0 if restored is None else restored.step
        self.peak_flops, self.flops = peak_flops(), cast(float | None, None)
        self.snapshots = EMASnapshots(workdir / EMA_SNAPSHOTS)
        self.metrics: Mapping[str, float] = {}  # of the last line of the log
        self._grid: pathlib.Path | None = None  # a sample grid that is not logged yet
        self._saving = False  # whether a checkpoint may still be written
        if not store.read_only:
            self.snapshots.drop_after(self.step)

    def save(self, step: int, state: TrainState, position: Any) -> None:
        """Write a checkpoint."""
        base_key = np.asarray(jax.random.key_data(self.base_key)).tolist()
        self.store.save(step, CheckpointState(*state), {"data": position, "base": base_key})
        self._saving = True

    def train(self, terminal: Terminal, stop: Callable[[], bool], callback: Callback) -> None:
        """Train to the last step."""
        config, program = self.config, self.program
        frozen = self.experiment.load_frozen(program.frozen_shardings)
        with (
            self._logs(terminal, callback) as log,
            Prefetch(self.experiment.batches, self._to_devices) as prefetched,
        ):
            self.state = loop.training_loop(
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
                    sample=lambda step, state: self._sample(step, state, frozen),
                    progress=terminal.step,
                    stop=stop,
                ),
            )

    def _sample(self, step: int, state: TrainState, frozen: PyTree) -> Mapping[str, float]:
        """The metrics of the EMA weights; their sample grid is written."""
        metrics, grid = self.experiment.sample(state.ema, frozen)
        if grid is not None and is_first():
            self._grid = self.workdir / "samples" / f"step_{step:06d}.png"
            with atomic_file(self._grid) as temporary:
                grid.save(temporary, format="PNG")
        return metrics

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
    def _logs(
        self, terminal: Terminal, callback: Callback
    ) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """The function that logs the values of a step."""
        logs = MetricLoggers(self.config, self.workdir, step=self.step) if is_first() else None

        def log(step: int, values: Mapping[str, float]) -> None:
            if self._saving:  # report a full disk now, not at the next checkpoint
                self._saving = not self.store.check()
            self.metrics = {
                **values,
                **self.experiment.batches.counts(),
                **memory_use(),
                **self._utilisation(values),
            }
            grid, self._grid = self._grid, None
            if logs is not None:
                logs(step, self.metrics, grid)
            terminal.values(step, self.metrics)
            callback(step, self.metrics)

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
        steps = [step for step in self.snapshots.steps() if step <= self.step]
        check_ema_std(std, bool(stds and steps), self.workdir)
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            self.state.power_ema,
        )
        snapshots = [(step, snapshot_std) for step in steps for snapshot_std in stds]
        coefficients = power_ema.post_hoc_coefficients(snapshots, steps[-1], std).reshape(
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


def memory_use() -> dict[str, float]:
    """`hbm_peak_gb`, the peak memory of this process's first device, and its fraction `hbm_share`.

    Empty for a device that does not report it, such as a CPU.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    peak, limit = stats.get("peak_bytes_in_use"), stats.get("bytes_limit")
    if not peak or not limit:
        return {}
    return {"hbm_peak_gb": peak / 1e9, "hbm_share": peak / limit}
