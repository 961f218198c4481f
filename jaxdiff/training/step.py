"""The pure training step and its data-parallel compilation."""

from collections.abc import Callable, Set
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from jaxdiff.core.types import Array, Key, PyTree
from jaxdiff.parallel.mesh import batch_sharding, replicated
from jaxdiff.training import ema
from jaxdiff.training.config import EMAConfig
from jaxdiff.training.per_sample_random import sample_keys
from jaxdiff.training.state import TrainState

Metrics = dict[str, Array]
Loss = Callable[[PyTree, PyTree, dict[str, Array], Array], tuple[Array, Metrics]]
Step = Callable[[TrainState, PyTree, dict[str, Array], Array], tuple[TrainState, Metrics]]


def make_step(
    loss: Loss,
    optimiser: optax.GradientTransformation,
    schedule: optax.Schedule,
    average: EMAConfig,
    limit: Callable[[PyTree], PyTree] = lambda params: params,
    accumulate: int = 1,
    at: Callable[[PyTree, Array], PyTree] = lambda frozen, step: frozen,
) -> Step:
    """The pure function (state, frozen, batch, base key) -> (state, metrics).

    `frozen` holds weights that the loss reads and nothing changes; they are an argument because
    constants inside a compiled function are folded and copied. The step's own key is
    fold_in(base key, step), so a resumed training draws what an uninterrupted one would. `limit`
    brings parameters back into their allowed range after each update. `accumulate` is the number of
    parts in which a batch is computed; the loss must be a mean over samples and draw by sample.
    `at` gives the loss what depends on the count of steps, as a part of `frozen`.

    Where loss, gradient or new parameters are not finite, the state stays as it is but for `step`,
    and the metric `skipped` is 1. The optimiser's own count stands still too, the learning rate's,
    which is `step`, does not.
    """

    gradient = accumulated(jax.value_and_grad(loss, has_aux=True), accumulate)
    rule = optax.with_extra_args_support(optimiser)

    def step(
        state: TrainState, frozen: PyTree, batch: dict[str, Array], base: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(base, state.step)
        (value, parts), grads = gradient(state.params, at(frozen, state.step), batch, key)
        updates, opt_state = rule.update(grads, state.opt_state, state.params, step=state.step)
        params = limit(optax.apply_updates(state.params, updates))
        decay = ema.decay_at(state.step, average.decay, warmup=average.warmup)
        averaged = ema.update(state.ema, params, decay)
        profiles = {
            width: ema.update(kept, params, ema.power_decay(state.step, float(width)))
            for width, kept in state.profiles.items()
        }
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        finite = jnp.isfinite(jnp.stack([value, *norms.values()])).all()
        new = (params, averaged, opt_state, profiles)
        old = (state.params, state.ema, state.opt_state, state.profiles)
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


def hold(loss: Loss, frozen: Set[str]) -> Loss:
    """`loss` of a flat table without gradients for the weights at the paths `frozen`.

    They come out as zeros, and what would only be computed for them is not.
    """
    if not frozen:
        return loss

    def held(
        params: PyTree, others: PyTree, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        stopped = {p: lax.stop_gradient(a) if p in frozen else a for p, a in params.items()}
        return loss(stopped, others, batch, key)

    return held


def accumulated(gradient: Callable[..., PyTree], parts: int) -> Callable[..., PyTree]:
    """`gradient` (parameters, frozen, batch, key) as the mean over `parts` of the batch, in turn.

    Part j has the samples j, j + parts, ...: of each device's share equally many.
    """
    if parts == 1:
        return gradient

    def mean(
        params: PyTree, frozen: PyTree, batch: dict[str, Array], key: Key[Array, ""]
    ) -> PyTree:
        n = len(next(iter(batch.values())))

        def cut(leaf: Array) -> Array:
            return jnp.moveaxis(leaf.reshape(n // parts, parts, *leaf.shape[1:]), 1, 0)

        def add(total: PyTree, part: tuple[dict[str, Array], Array]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, gradient(params, frozen, *part)), None

        cuts = jax.tree.map(cut, (batch, sample_keys(key, n)))
        shapes = jax.eval_shape(gradient, params, frozen, *jax.tree.map(lambda leaf: leaf[0], cuts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = lax.scan(add, zeros, cuts)
        return jax.tree.map(lambda leaf: leaf / parts, total)

    return mean


def compile_step(step: Step, mesh: Mesh, state: PyTree = None, frozen: PyTree = None) -> Any:
    """`step` under jit: the batch split over `mesh`, the state's buffers reused.

    `state` and `frozen` are the shardings of either (None: whole on every device). The state passed
    in is donated: it must not be read after the call.
    """
    whole, split = replicated(mesh), batch_sharding(mesh)
    state, frozen = (whole if part is None else part for part in (state, frozen))

    def on_mesh(*arguments: Any) -> Any:
        # Kernels that the compiler cannot divide ask which mesh they are on.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return jax.jit(
        on_mesh,
        in_shardings=(state, frozen, split, whole),
        out_shardings=(state, whole),
        donate_argnums=0,
    )
