"""From a network and a guidance rule to the denoiser that samplers call."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.core.validate import shape
from jaxdiff.diffusion.predictions import Denoiser, Prediction
from jaxdiff.diffusion.timesteps import Level
from jaxdiff.guidance.rules import Guidance, Query

# (weights, x (n h w c), t (n,), conditioning with leaves (n, ...)) -> output (n h w c)
Network = Callable[[PyTree, Array, Array, PyTree], Array]


def stack_streams(*conditionings: PyTree) -> PyTree:
    """Leaves (b, ...) of K conditionings, null first, as leaves (b, K, ...)."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *conditionings)


def guided(
    network: Network,
    weights: PyTree,
    conditioning: PyTree,
    parameters: PyTree,
    *,
    rule: Guidance,
    kind: str,
) -> Denoiser:
    """The denoiser of a network that predicts `kind`, guided by `rule`.

    `conditioning` has leaves (b, K, ...) for the K streams of the rule; None stands for none.
    All streams of all images go through one network call, image by image: [null_0, cond_0,
    null_1, cond_1, ...]. This order keeps the streams of an image on the device of the image when
    the batch is sharded; all nulls before all conditions would have to be exchanged at each step.
    The network sees its own dtype; combining happens in that of x, which is float32.
    """
    K = rule.streams
    for leaf in jax.tree.leaves(conditioning):
        shape("conditioning", leaf, (None, K, *leaf.shape[2:]))
    flat = jax.tree.map(lambda c: c.reshape(-1, *c.shape[2:]), conditioning)

    def denoise(x: Float[Array, "b *d"], level: Level, memory: PyTree) -> tuple[Prediction, PyTree]:
        t = jnp.broadcast_to(level.t, (len(x) * K,))
        output = network(weights, jnp.repeat(x, K, axis=0), t, flat)
        streams = output.astype(x.dtype).reshape(len(x), K, *output.shape[1:])
        outputs = tuple(streams[:, i] for i in range(K))
        return rule.combine(outputs, Query(x, level, kind), parameters, memory)

    return denoise
