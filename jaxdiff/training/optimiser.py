"""Optimisers with linear warm-up, constant rate, final decay and global-norm clipping.

All optimisers give updates of about unit size, so that a learning rate and a weight decay mean the
same for all of them, except for lion: its updates are signs, and it needs a third to a tenth of
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

# Trained by Adam under muon: embeddings, and the first and the last layer of a network.
_ADAM_PATHS = re.compile(r"(^|\.)(conv_in|conv_out|patch_embedding|pos_embed)\.|embedding$")
# Stored positions, and the statistics of a prior's embeddings.
_CONSTANT = re.compile(r"(^|\.)(pos_embed|clip_mean|clip_std)$")
_RMS = 0.2  # of an update of AdamW, as measured in 2502.16982, section 2.2


def learning_rate(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Step index -> learning rate: linear warm-up, constant, then decay over the last fraction."""
    warmup = max(config.warmup_steps, 1)
    # If both do not fit, warm-up is kept whole and the decay is shorter, but complete.
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


def weight_decay_mask(params: PyTree) -> PyTree:
    """True for the leaves that weight decay applies to: kernels, not biases, norms or scalars."""

    def decays(path: tuple[Any, ...], leaf: Array) -> bool:
        return leaf.ndim >= 2 and not is_constant(_name(path))

    return jax.tree_util.tree_map_with_path(decays, params)


def is_constant(path: str) -> bool:
    """Whether the weight at `path` is a constant of its network, whose gradient is zero."""
    return bool(_CONSTANT.search(path))


def _name(path: tuple[Any, ...]) -> str:
    """The dotted path of a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def lr_multipliers(paths: Iterable[str], config: OptimiserConfig) -> dict[str, float]:
    """The learning rate multiplier of each weight; InputError for a pattern without a match."""
    multipliers = {path: lr_multiplier(path, config) for path in paths}
    for pattern, _ in config.lr_multipliers:
        if not any(re.search(pattern, path) for path in multipliers):
            raise InputError(
                f"optimiser.lr_multipliers: got {pattern!r}, which matches no weight, expected "
                f"a pattern of paths such as {next(iter(multipliers))}"
            )
    if not any(multipliers.values()):
        raise InputError(
            "optimiser.lr_multipliers: got nothing that is trained, expected some weights"
        )
    return multipliers


def lr_multiplier(path: str, config: OptimiserConfig) -> float:
    """The first of `config.lr_multipliers` whose pattern matches `path`, else 1."""
    return next((float(f) for pattern, f in config.lr_multipliers if re.search(pattern, path)), 1.0)


def make_optimiser(
    config: OptimiserConfig, steps: int, multipliers: Mapping[str, float] | None = None
) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation of a training of `steps` steps; its update takes `step`.

    `multipliers` are those of the learning rate by path. A weight with 0 does not change, has no
    state, and its gradients do not count for clipping.
    """
    schedule = learning_rate(config, steps)
    multiplier_by_path = {} if multipliers is None else dict(multipliers)
    trained = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _OPTIMISERS[config.name](config),
        optax.add_decayed_weights(config.weight_decay, mask=weight_decay_mask),
        _scale_by_path(multiplier_by_path),
        _scale_by_learning_rate(schedule),
    )
    if all(multiplier_by_path.values()):
        return trained
    labels = {path: "trained" if value else "frozen" for path, value in multiplier_by_path.items()}
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def _adam(config: OptimiserConfig) -> optax.GradientTransformation:
    """Adam (1412.6980); with decay beside it AdamW (1711.05101)."""
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)


def _lion(config: OptimiserConfig) -> optax.GradientTransformation:
    """The sign of a mean of gradients (2302.06675)."""
    return optax.scale_by_lion(b1=config.beta1, b2=config.beta2)


def _adafactor(config: OptimiserConfig) -> optax.GradientTransformation:
    """Squares kept as row and column means, updates clipped at RMS 1 (1804.04235), no momentum."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _muon(config: OptimiserConfig) -> optax.GradientTransformation:
    """Orthogonalised momentum for kernels, Adam for all other weights (2502.16982).

    A convolution's kernel is the matrix from its patches to its outputs.
    """

    def axes(params: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf: contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1),
            params,
        )

    def rescale(update: Array) -> Array:
        width = max(math.prod(update.shape[:-1]), update.shape[-1])
        return _RMS * math.sqrt(width) * update

    orthogonalised = contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=axes)
    rescaled = optax.stateless(lambda updates, _: jax.tree.map(rescale, updates))
    rules: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(orthogonalised, rescaled),
        "adam": _adam(config),
    }
    return optax.partition(rules, _muon_or_adam)


def _muon_or_adam(params: PyTree) -> PyTree:
    def choose(path: tuple[Any, ...], leaf: Array) -> str:
        return "adam" if leaf.ndim < 2 or _ADAM_PATHS.search(_name(path)) else "muon"

    return jax.tree_util.tree_map_with_path(choose, params)


_OPTIMISERS: dict[str, Callable[[OptimiserConfig], optax.GradientTransformation]] = {
    "adamw": _adam,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def _scale_by_path(multipliers: Mapping[str, float]) -> optax.GradientTransformation:
    """Updates by path times their multipliers."""

    def scale(updates: PyTree, params: PyTree) -> PyTree:
        # updates that another transformation handles are empty trees here
        return {
            path: jax.tree.map(lambda leaf, by=multipliers[path]: leaf * by, update)
            for path, update in updates.items()
        }

    others = any(value not in (0, 1) for value in multipliers.values())
    return optax.stateless(scale) if others else optax.identity()


def _scale_by_learning_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Updates times minus the learning rate at `step`, an argument of the update."""

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        rate = jnp.asarray(schedule(extra_args["step"]))
        return jax.tree.map(lambda leaf: -rate.astype(leaf.dtype) * leaf, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
