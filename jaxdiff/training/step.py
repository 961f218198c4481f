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
    ema_config: EMAConfig,
    project_params: Callable[[PyTree], PyTree] = lambda params: params,
    accumulation_steps: int = 1,
    frozen_at_step: Callable[[PyTree, Array], PyTree] = lambda frozen, step: frozen,
) -> Step:
    """The pure function (state, frozen, batch, base key) -> (state, metrics).

    `frozen` are weights that the loss reads and no update changes; they are an argument because
    constants inside a compiled function are folded and copied. The key of a step is
    fold_in(base key, step), so a resumed training has the same random numbers. `project_params`
    maps parameters into their allowed range after each update. A batch is computed in
    `accumulation_steps` parts; the loss must be a mean over samples with a random key per sample.
    `frozen_at_step` adds to `frozen` what depends on the step.

    If the loss, a gradient or a new parameter is not finite, only `step` changes, and the metric
    `nonfinite_steps` is 1. The optimiser's own step count does not advance, the learning rate
    schedule, which depends on `step`, does.
    """

    gradient = accumulate_gradients(jax.value_and_grad(loss, has_aux=True), accumulation_steps)
    transform = optax.with_extra_args_support(optimiser)

    def step(
        state: TrainState, frozen: PyTree, batch: dict[str, Array], base_key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(base_key, state.step)
        (value, loss_parts), grads = gradient(
            state.params, frozen_at_step(frozen, state.step), batch, key
        )
        updates, opt_state = transform.update(grads, state.opt_state, state.params, step=state.step)
        params = project_params(optax.apply_updates(state.params, updates))
        decay = ema.decay_at(state.step, ema_config.decay, warmup=ema_config.warmup)
        new_ema = ema.update(state.ema, params, decay)
        new_power_ema = {
            std: ema.update(kept, params, ema.power_decay(state.step, float(std)))
            for std, kept in state.power_ema.items()
        }
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        finite = jnp.isfinite(jnp.stack([value, *norms.values()])).all()
        new = (params, new_ema, opt_state, new_power_ema)
        old = (state.params, state.ema, state.opt_state, state.power_ema)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = (
            loss_parts
            | norms
            | {
                "loss": value,
                "learning_rate": schedule(state.step),
                "nonfinite_steps": 1 - finite.astype(jnp.float32),
            }
        )
        return TrainState(state.step + 1, *kept), metrics

    return step


def stop_gradients_for(loss: Loss, frozen: Set[str]) -> Loss:
    """`loss` with stopped gradients for the parameters at the paths `frozen`.

    Their gradients are zeros, and nothing is computed for them.
    """
    if not frozen:
        return loss

    def loss_without_gradients(
        params: PyTree, frozen_weights: PyTree, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        stopped = {p: lax.stop_gradient(a) if p in frozen else a for p, a in params.items()}
        return loss(stopped, frozen_weights, batch, key)

    return loss_without_gradients


def accumulate_gradients(gradient: Callable[..., PyTree], parts: int) -> Callable[..., PyTree]:
    """`gradient` (parameters, frozen, batch, key) as the mean over `parts` of the batch, in turn.

    Part j has the samples j, j + parts, ..., so it has equally many of each device's.
    """
    if parts == 1:
        return gradient

    def mean(
        params: PyTree, frozen: PyTree, batch: dict[str, Array], key: Key[Array, ""]
    ) -> PyTree:
        n = len(next(iter(batch.values())))

        def split_batch(leaf: Array) -> Array:
            return jnp.moveaxis(leaf.reshape(n // parts, parts, *leaf.shape[1:]), 1, 0)

        def add(total: PyTree, microbatch: tuple[dict[str, Array], Array]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, gradient(params, frozen, *microbatch)), None

        microbatches = jax.tree.map(split_batch, (batch, sample_keys(key, n)))
        shapes = jax.eval_shape(
            gradient, params, frozen, *jax.tree.map(lambda leaf: leaf[0], microbatches)
        )
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = lax.scan(add, zeros, microbatches)
        return jax.tree.map(lambda leaf: leaf / parts, total)

    return mean


def compile_step(step: Step, mesh: Mesh, state: PyTree = None, frozen: PyTree = None) -> Any:
    """`step` under jit: the batch split over `mesh`, the state's buffers reused.

    `state` and `frozen` are the shardings of either (None: replicated). The state passed
    in is donated: it must not be read after the call.
    """
    replicate, shard = replicated(mesh), batch_sharding(mesh)
    state, frozen = (replicate if sharding is None else sharding for sharding in (state, frozen))

    def on_mesh(*arguments: Any) -> Any:
        # Kernels that the compiler cannot partition look up the mesh.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return jax.jit(
        on_mesh,
        in_shardings=(state, frozen, shard, replicate),
        out_shardings=(state, replicate),
        donate_argnums=0,
        keep_unused=True,  # frozen weights that only sampling reads count as memory
    )
