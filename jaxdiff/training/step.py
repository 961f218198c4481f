"""The pure training step and its data-parallel compilation."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxdiff.core.types import Array, Key, PyTree
from jaxdiff.parallel.mesh import batch_sharding, replicated
from jaxdiff.training import ema
from jaxdiff.training.state import TrainState

Metrics = dict[str, Array]
Loss = Callable[[PyTree, PyTree, dict[str, Array], Array], tuple[Array, Metrics]]
Step = Callable[[TrainState, PyTree, dict[str, Array], Array], tuple[TrainState, Metrics]]


def make_step(
    loss: Loss,
    optimiser: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema_decay: float,
    limit: Callable[[PyTree], PyTree] = lambda params: params,
) -> Step:
    """The pure function (state, frozen, batch, base key) -> (state, metrics).

    `frozen` holds weights that the loss reads and nothing changes; they are an argument because
    constants inside a compiled function are folded and copied. The step's own key is
    fold_in(base key, step), so a resumed training draws what an uninterrupted one would. `limit`
    brings parameters back into their allowed range after each update.
    """

    def step(
        state: TrainState, frozen: PyTree, batch: dict[str, Array], base: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(base, state.step)
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, parts), grads = gradient(state.params, frozen, batch, key)
        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        params = limit(optax.apply_updates(state.params, updates))
        averaged = ema.update(state.ema, params, ema.decay_at(state.step, ema_decay))
        metrics = parts | {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            # Not finite as soon as one parameter is not, a step before the loss shows it.
            "param_norm": optax.tree.norm(params),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, averaged, opt_state), metrics

    return step


def compile_step(step: Step, mesh: Mesh, state: PyTree = None, frozen: PyTree = None) -> Any:
    """`step` under jit: the batch split over `mesh`, the state's buffers reused.

    `state` and `frozen` are the shardings of either (None: whole on every device). The state passed
    in is donated: it must not be read after the call.
    """
    whole, split = replicated(mesh), batch_sharding(mesh)
    state, frozen = (whole if part is None else part for part in (state, frozen))
    return jax.jit(
        step,
        in_shardings=(state, frozen, split, whole),
        out_shardings=(state, whole),
        donate_argnums=0,
    )
