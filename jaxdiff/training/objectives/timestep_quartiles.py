"""The loss by timestep, for evaluations."""

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, Int

Times = Float[Array, "b"] | Int[Array, "b"]


def loss_by_timestep_quartile(
    errors: Float[Array, "b"], t: Times, num_timesteps: float
) -> dict[str, Float[Array, ""]]:
    """The mean error in each quarter of the timesteps, loss_q1 the cleanest; 0 for an empty one."""
    quarter = 4 * t // num_timesteps
    means = {}
    for i in range(4):
        inside = (quarter == i).astype(errors.dtype)
        means[f"loss_q{i + 1}"] = jnp.sum(errors * inside) / jnp.maximum(jnp.sum(inside), 1)
    return means
