"""Optimisers with warm-up, a constant stretch, a decay at the end and global-norm clipping.

Every rule ends in updates of about unit size, so that a learning rate and a weight decay mean the
same under all of them, but for lion: its updates are signs, and it wants a third to a tenth of
AdamW's rate (2302.06675, section 5).
"""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, PyTree
from jaxdiff.training.config import OptimiserConfig

# What muon leaves to Adam: tables of embeddings, and the first and the last layer of a network.
_EDGES = re.compile(r"(^|\.)(conv_in|conv_out|patch_embedding)\.|embedding$")
_RMS = 0.2  # of an update of AdamW, as measured in 2502.16982, section 2.2


def learning_rate(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Step index -> learning rate: linear warm-up, constant, then decay over the last fraction."""
    warmup = max(config.warmup_steps, 1)
    # What warm-up and decay cannot both have is the warm-up's, so that the decay reaches its end.
    decay_steps = min(int(config.decay_fraction * steps), max(steps - warmup, 0))
    last = config.learning_rate * config.min_lr_ratio
    constant = optax.constant_schedule(config.learning_rate)
    tails = {
        "linear": optax.linear_schedule(config.learning_rate, last, max(decay_steps, 1)),
        "cosine": optax.cosine_decay_schedule(
            config.learning_rate, max(decay_steps, 1), alpha=config.min_lr_ratio
        ),
    }
    tail = tails[config.decay] if decay_steps else constant
    # From 1/warmup, not 0: a first step at rate zero would be wasted.
    rise = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, warmup - 1)
    return optax.join_schedules([rise, constant, tail], [warmup, max(steps - decay_steps, warmup)])


def matrices(params: PyTree) -> PyTree:
    """True for the leaves that weight decay applies to: kernels, not biases, norms or scalars."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def factors(paths: Iterable[str], config: OptimiserConfig) -> dict[str, float]:
    """The factor of the learning rate of each weight; InputError for a pattern that finds none."""
    found = {path: path_factor(path, config) for path in paths}
    for pattern, _ in config.lr_multipliers:
        if not any(re.search(pattern, path) for path in found):
            raise InputError(
                f"optimiser.lr_multipliers: got {pattern!r}, which no weight's path has, expected "
                f"a pattern of paths such as {next(iter(found))}"
            )
    if not any(found.values()):
        raise InputError(
            "optimiser.lr_multipliers: got nothing that is trained, expected some weights"
        )
    return found


def path_factor(path: str, config: OptimiserConfig) -> float:
    """The factor of the first of `config.groups` whose pattern is found in `path`, else 1."""
    return next((float(f) for pattern, f in config.lr_multipliers if re.search(pattern, path)), 1.0)


def optimiser(
    config: OptimiserConfig, steps: int, factor: Mapping[str, float] | None = None
) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation of a training of `steps` steps; its update is told the `step`.

    `factor` is that of the learning rate of each weight of a flat table; what has 0 does not
    change, has no state, and its gradients do not count for clipping.
    """
    schedule = learning_rate(config, steps)
    chosen = {} if factor is None else dict(factor)
    trained = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _RULES[config.name](config),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
        _each(chosen),
        _follow(schedule),
    )
    if all(chosen.values()):
        return trained
    labels = {path: "trained" if value else "frozen" for path, value in chosen.items()}
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def _adam(config: OptimiserConfig) -> optax.GradientTransformation:
    """Adam (1412.6980); with decay beside it AdamW (1711.05101)."""
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)


def _lion(config: OptimiserConfig) -> optax.GradientTransformation:
    """Signs of a mean of gradients (2302.06675)."""
    return optax.scale_by_lion(b1=config.beta1, b2=config.beta2)


def _adafactor(config: OptimiserConfig) -> optax.GradientTransformation:
    """Squares kept as row and column means, updates clipped at RMS 1 (1804.04235), no momentum."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _muon(config: OptimiserConfig) -> optax.GradientTransformation:
    """Kernels follow an orthogonal matrix near their momentum; all others Adam (2502.16982).

    A convolution's kernel is the matrix from its patches to its outputs.
    """

    def axes(params: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf: contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1),
            params,
        )

    def resize(update: Array) -> Array:
        width = max(math.prod(update.shape[:-1]), update.shape[-1])
        return _RMS * math.sqrt(width) * update

    turned = contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=axes)
    sized = optax.stateless(lambda updates, _: jax.tree.map(resize, updates))
    rules: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(turned, sized),
        "adam": _adam(config),
    }
    return optax.partition(rules, _muon_or_adam)


def _muon_or_adam(params: PyTree) -> PyTree:
    def choose(path: tuple[Any, ...], leaf: Array) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return "adam" if leaf.ndim < 2 or _EDGES.search(name) else "muon"

    return jax.tree_util.tree_map_with_path(choose, params)


_RULES: dict[str, Callable[[OptimiserConfig], optax.GradientTransformation]] = {
    "adamw": _adam,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def _each(factor: Mapping[str, float]) -> optax.GradientTransformation:
    """Updates of a flat table times their factors."""

    def scale(updates: PyTree, params: PyTree) -> PyTree:
        # what another rule has is an empty tree here
        return {
            path: jax.tree.map(lambda leaf, by=factor[path]: leaf * by, update)
            for path, update in updates.items()
        }

    others = any(value not in (0, 1) for value in factor.values())
    return optax.stateless(scale) if others else optax.identity()


def _follow(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Updates times minus the learning rate at the `step` that the update is told."""

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **told: Any
    ) -> tuple[PyTree, PyTree]:
        rate = jnp.asarray(schedule(told["step"]))
        return jax.tree.map(lambda leaf: -rate.astype(leaf.dtype) * leaf, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
