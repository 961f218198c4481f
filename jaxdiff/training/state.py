"""Everything that a training step changes."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdiff.core.trees import cast_floating
from jaxdiff.core.types import Array, Int, PyTree


class TrainState(NamedTuple):
    """The whole state as one flat pytree; `step` counts finished updates."""

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree  # float32, same structure as params
    opt_state: PyTree
    profiles: dict[str, PyTree] = {}  # power-function averages by their width, as ema  # noqa: RUF012


def initial_state(
    params: PyTree, optimiser: optax.GradientTransformation, widths: Sequence[float] = ()
) -> TrainState:
    """The state before the first step; `jax.eval_shape` gives its shapes without arrays."""

    def average() -> PyTree:
        return jax.tree.map(jnp.copy, cast_floating(params, jnp.float32))

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=average(),
        opt_state=optimiser.init(params),
        profiles={str(width): average() for width in widths},
    )
