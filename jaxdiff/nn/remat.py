"""What is kept between the way there and the way back of a gradient, and what is computed again."""

from collections.abc import Callable
from typing import Any, cast

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxdiff.core.types import PyTree

KEPT = "kept"
# The last is cuDNN's attention, which jax gives no other name.
PRODUCTS = ("dot_general", "conv_general_dilated", "dot_product_attention_fwd_wrapper")


def kept(value: PyTree) -> PyTree:
    """`value`, small or dear, which "products" keeps although no product gave it."""
    return jax.tree.map(lambda x: checkpoint_name(x, KEPT), value)


def _is_product(primitive: Any, *_: Any, **parameters: Any) -> bool:
    return primitive.name in PRODUCTS


_policies = jax.checkpoint_policies
# Inside a stage of a UNet; its inputs are kept.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # nothing is computed again
    # norms and activations are: what matrices, convolutions, attention and statistics gave is kept
    "products": _policies.save_from_both_policies(
        _is_product, _policies.save_only_these_names(KEPT)
    ),
    "blocks": _policies.nothing_saveable,  # all of a stage is
}


def rematerialised(stage: nnx.Module, remat: str) -> Callable[..., Any]:
    """`stage` as a function whose gradients keep what REMAT says; the numbers are the same."""
    policy = REMAT[remat]
    if policy is None:
        return cast(Callable[..., Any], stage)

    def call(*arrays: Any, **options: Any) -> Any:
        sizes = {name: options.pop(name) for name in ("size",) if name in options}
        inside = jax.checkpoint(lambda a, o: stage(*a, **o, **sizes), policy=policy)
        return inside(arrays, options)

    return call
