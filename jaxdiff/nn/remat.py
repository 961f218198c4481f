"""What is kept between the way there and the way back of a gradient, and what is computed again."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxdiff.core.types import PyTree

P = ParamSpec("P")
R = TypeVar("R")
KEPT = "kept"
# The last is cuDNN's attention, which jax gives no other name.
PRODUCTS = ("dot_general", "conv_general_dilated", "dot_product_attention_fwd_wrapper")


def kept(value: PyTree) -> PyTree:
    """`value`, small or dear, which "products" keeps although no product gave it."""
    return jax.tree.map(lambda x: checkpoint_name(x, KEPT), value)


def _is_product(primitive: Any, *_: Any, **parameters: Any) -> bool:
    return primitive.name in PRODUCTS


_policies = jax.checkpoint_policies
# Inside a block; its inputs are kept.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # nothing is computed again
    # norms and activations are: what matrices, convolutions, attention and statistics gave is kept
    "products": _policies.save_from_both_policies(
        _is_product, _policies.save_only_these_names(KEPT)
    ),
    "blocks": _policies.nothing_saveable,  # all of a block is
}


def rematerialised(
    call: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[Any, P], R]:
    """The method `call` of a block, whose gradients keep what the block's `remat` says.

    That is a name in REMAT. The numbers are the same.
    """

    @functools.wraps(call)
    def again(block: Any, *arrays: P.args, **named: P.kwargs) -> R:
        apply = functools.partial(call, block)
        policy = REMAT[block.remat]
        return (apply if policy is None else jax.checkpoint(apply, policy=policy))(*arrays, **named)

    return again
