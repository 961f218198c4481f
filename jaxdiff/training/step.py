"""The training step of an objective: pure, compiled for a mesh, and the state that it changes.

Parameters are flat dicts from dotted path to array, as `models.build.param_dict` gives them.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from jaxdiff.core.trees import cast_floating
from jaxdiff.core.types import Array, Dtype, Float, Int, Key, NDArray, PyTree
from jaxdiff.parallel.chips import compiler_options
from jaxdiff.parallel.mesh import batch_sharding, replicated
from jaxdiff.parallel.sharding import (
    ANY,
    Rules,
)
from jaxdiff.training.config import EMAConfig
from jaxdiff.training.power_ema import power_decay

Params = dict[str, Array]
HostParams = dict[str, NDArray]  # parameters on the host
Metrics = dict[str, Array]
# (parameters, frozen weights, batch, key or keys of the samples) -> (scalar loss, metrics)
Loss = Callable[[PyTree, PyTree, dict[str, Array], Key[Array, "..."]], tuple[Array, Metrics]]
# (state, frozen weights, batch, base key) -> (state, metrics)
Step = Callable[["TrainState", PyTree, dict[str, Array], Array], tuple["TrainState", Metrics]]


def _unchanged(frozen: Any, step: Array) -> Any:
    return frozen


def _no_metrics(
    params: Params, frozen: Any, batch: dict[str, Array], key: Key[Array, "..."]
) -> Metrics:
    return {}


class TrainingTask(NamedTuple):
    """An objective with its networks: initial parameters, and the loss of a batch."""

    # shapes and dtypes of the parameters
    shapes: Params
    # seed -> path and initial value of each parameter, one at a time
    init: Callable[[int], Iterator[tuple[str, NDArray]]]
    # a mean over samples, with a random key for each
    loss: Loss
    # updated parameters -> the nearest allowed ones
    project_params: Callable[[Params], Params] = lambda params: params
    # sharding rules of the parameters
    rules: Rules = ANY
    # metrics of a validation batch, where there are more than the loss
    eval_metrics: Callable[[Params, Any, dict[str, Array], Key[Array, "..."]], Metrics] = (
        _no_metrics
    )
    # (frozen weights, step) -> the `frozen` argument of the loss at that step
    frozen_at_step: Callable[[Any, Array], Any] = _unchanged
    transformer: bool = False  # whether most of the work is a transformer's, for the compiler


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
        decay = ema_decay(state.step, ema_config.decay, warmup=ema_config.warmup)
        new_ema = update_ema(state.ema, params, decay)
        new_power_ema = {
            std: update_ema(ema, params, power_decay(state.step, float(std)))
            for std, ema in state.power_ema.items()
        }
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        finite = jnp.isfinite(jnp.stack([value, *norms.values()])).all()
        new = (params, new_ema, opt_state, new_power_ema)
        old = (state.params, state.ema, state.opt_state, state.power_ema)
        selected = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = {
            **loss_parts,
            **norms,
            "loss": value,
            "learning_rate": schedule(state.step),
            "nonfinite_steps": 1 - finite.astype(jnp.float32),
        }
        return TrainState(state.step + 1, *selected), metrics

    return step


def ema_decay(step: Int[Array, ""], decay: float, *, warmup: bool = True) -> Float[Array, ""]:
    """The decay b after `step` = n finished updates; with warm-up min(b, (1 + n) / (10 + n))."""
    n = step.astype(jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n)) if warmup else jnp.float32(decay)


def update_ema(ema: PyTree, params: PyTree, decay: Float[Array, ""]) -> PyTree:
    """b ema + (1 - b) params, written so that equal trees are an exact fixed point."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(jnp.float32) - e), ema, params)


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


def compile_step(
    step: Step,
    mesh: Mesh,
    state: PyTree = None,
    frozen: PyTree = None,
    *,
    transformer: bool = False,
) -> Any:
    """`step` under jit: the batch split over `mesh`, the state's buffers reused.

    `state` and `frozen` are the shardings of either (None: replicated). The state passed
    in is donated: it must not be read after the call. `transformer`: see TrainingTask.
    """
    device = mesh.devices.flat[0].device_kind
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
        compiler_options=compiler_options(device, transformer=transformer),
        keep_unused=True,  # frozen weights that only sampling reads count as memory
    )


def sample_keys(key: Key[Array, "..."], n: int) -> Key[Array, "n"]:
    """The keys of n samples."""
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def per_sample_split(key: Key[Array, "..."], n: int, count: int) -> tuple[Key[Array, "n"], ...]:
    """`count` independent keys for each of n samples: one array of n keys for each purpose."""
    keys = jax.vmap(lambda k: jax.random.split(k, count))(sample_keys(key, n))
    return tuple(keys[:, i] for i in range(count))


def per_sample_normal(
    key: Key[Array, "..."], shape: tuple[int, ...], dtype: Dtype = jnp.float32
) -> Array:
    """Standard normal samples of `shape`, whose first axis is the batch."""
    return _vmap(key, shape, lambda k: jax.random.normal(k, shape[1:], dtype))


def per_sample_uniform(
    key: Key[Array, "..."], shape: tuple[int, ...], low: float = 0.0, high: float = 1.0
) -> Array:
    """Uniform samples in [low, high) of `shape`, whose first axis is the batch."""
    return _vmap(key, shape, lambda k: jax.random.uniform(k, shape[1:], minval=low, maxval=high))


def _vmap(
    key: Key[Array, "..."], shape: tuple[int, ...], sample: Callable[[Key[Array, ""]], Array]
) -> Array:
    return jax.vmap(sample)(sample_keys(key, shape[0]))
