"""Everything that a training step changes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdiff.core.trees import cast
from jaxdiff.core.types import Array, Int, PyTree


class TrainState(NamedTuple):
    """The whole state as one flat pytree; `step` counts finished updates."""

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree  # float32, same structure as params
    opt_state: PyTree


def initial_state(params: PyTree, optimiser: optax.GradientTransformation) -> TrainState:
    """The state before the first step; `jax.eval_shape` gives its shapes without arrays."""
    ema = jax.tree.map(jnp.copy, cast(params, jnp.float32))
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, ema=ema, opt_state=optimiser.init(params)
    )
