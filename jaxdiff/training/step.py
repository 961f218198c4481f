"""The pure training step and its data-parallel compilation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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

    Where loss, gradient or new parameters are not finite, the state stays as it is but for `step`,
    and the metric `skipped` is 1. The optimiser's own count stands still too.
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
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        finite = jnp.isfinite(jnp.stack([value, *norms.values()])).all()
        new, old = (params, averaged, opt_state), (state.params, state.ema, state.opt_state)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = (
            parts
            | norms
            | {
                "loss": value,
                "learning_rate": schedule(state.step),
                "skipped": 1 - finite.astype(jnp.float32),
            }
        )
        return TrainState(state.step + 1, *kept), metrics

    return step


def compile_step(step: Step, mesh: Mesh) -> Any:
    """`step` under jit: batch split over "data", all else replicated, the state's buffers reused.

    The state passed in is donated: it must not be read after the call.
    """
    whole, split = replicated(mesh), batch_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(whole, whole, split, whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )
