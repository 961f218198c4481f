"""AdamW with warm-up, a constant stretch, a decay at the end and global-norm clipping."""

import jax
import optax

from jaxdiff.core.types import PyTree
from jaxdiff.training.config import OptimiserConfig


def learning_rate(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Step index -> learning rate: linear warm-up, constant, then decay over the last fraction."""
    warmup = max(config.warmup_steps, 1)
    # What warm-up and decay cannot both have is the warm-up's, so that the decay reaches its end.
    decay_steps = min(int(config.decay_fraction * steps), max(steps - warmup, 0))
    last = config.learning_rate * config.final_fraction
    constant = optax.constant_schedule(config.learning_rate)
    tails = {
        "linear": optax.linear_schedule(config.learning_rate, last, max(decay_steps, 1)),
        "cosine": optax.cosine_decay_schedule(
            config.learning_rate, max(decay_steps, 1), alpha=config.final_fraction
        ),
    }
    tail = tails[config.decay] if decay_steps else constant
    # From 1/warmup, not 0: a first step at rate zero would be wasted.
    rise = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, warmup - 1)
    return optax.join_schedules([rise, constant, tail], [warmup, max(steps - decay_steps, warmup)])


def matrices(params: PyTree) -> PyTree:
    """True for the leaves that weight decay applies to: kernels, not biases, norms or scalars."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """The gradient transformation of a training of `steps` steps."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=matrices,
        ),
    )
