"""A training in its workdir: its state, its step, and what surrounds them."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff.checkpoints.training_state import TrainingStore
from jaxdiff.cli.training.experiment import Experiment
from jaxdiff.cli.training.terminal import Terminal
from jaxdiff.parallel.mesh import make_mesh, place, replicated, shard_batch
from jaxdiff.parallel.processes import fetch, is_first
from jaxdiff.parallel.rules import sharded_like, split_any
from jaxdiff.training import loop
from jaxdiff.training.config import (
    MeshConfig,
    TrainConfig,
)
from jaxdiff.training.log import JsonlLog
from jaxdiff.training.optimiser import learning_rate, optimiser
from jaxdiff.training.prefetch import Prefetch
from jaxdiff.training.state import TrainState, initial_state
from jaxdiff.training.step import compile_step, make_step


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
            learner.at,
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
