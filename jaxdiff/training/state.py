"""Everything that a training step changes."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdiff.core.trees import cast_floating
from jaxdiff.core.types import Array, Int, PyTree


class TrainState(NamedTuple):
    """The complete state as one pytree; `step` counts finished updates."""

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree  # float32, same structure as params
    opt_state: PyTree
    power_ema: dict[str, PyTree] = {}  # power-function EMAs by their std, as ema  # noqa: RUF012


class CheckpointState(NamedTuple):
    """A TrainState with the field names, in the same order, that checkpoints on disk have."""

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    profiles: dict[str, PyTree]  # power_ema


def initial_state(
    params: PyTree, optimiser: optax.GradientTransformation, power_stds: Sequence[float] = ()
) -> TrainState:
    """The state before the first step; `jax.eval_shape` gives its shapes without arrays."""

    def ema_copy() -> PyTree:
        return jax.tree.map(jnp.copy, cast_floating(params, jnp.float32))

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=ema_copy(),
        opt_state=optimiser.init(params),
        power_ema={str(std): ema_copy() for std in power_stds},
    )
