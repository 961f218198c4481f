"""Rematerialisation: what the forward pass saves for the backward pass, and what is recomputed."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxdiff.core.types import PyTree

P = ParamSpec("P")
R = TypeVar("R")
SAVED_NAME = "kept"
BETWEEN_BLOCKS = "between blocks"
# The last is cuDNN's attention, which jax gives no other name.
MATMUL_PRIMITIVES = ("dot_general", "conv_general_dilated", "dot_product_attention_fwd_wrapper")


def save_for_backward(value: PyTree) -> PyTree:
    """Mark `value` as saved by "products", although no matrix product computed it."""
    return jax.tree.map(lambda x: checkpoint_name(x, SAVED_NAME), value)


def save_between_blocks(value: PyTree) -> PyTree:
    """Mark the arrays in `value` as inputs of a network or block: see `saved_beside_shards`."""
    return jax.tree.map(
        lambda x: checkpoint_name(x, BETWEEN_BLOCKS) if isinstance(x, jax.Array) else x, value
    )


def _is_matmul(primitive: Any, *_: Any, **parameters: Any) -> bool:
    return primitive.name in MATMUL_PRIMITIVES


_policies = jax.checkpoint_policies
# Inside a block; its inputs are saved.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # nothing is recomputed
    # norms and activations are; outputs of matrices, convolutions, attention, statistics are saved
    "products": _policies.save_from_both_policies(
        _is_matmul, _policies.save_only_these_names(SAVED_NAME)
    ),
    "blocks": _policies.nothing_saveable,  # all of a block is
}


def saved_beside_shards(remat: str) -> Callable[..., Any]:
    """The policy of a loss that gathers its weights again for the backward pass.

    A policy around blocks decides inside them too. So it is theirs, which `remat` names in REMAT
    and which is not "none", and what is marked as the input of a network or block is saved.
    """
    between = _policies.save_only_these_names(BETWEEN_BLOCKS)
    return _policies.save_from_both_policies(REMAT[remat], between)


def remat(
    call: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[Any, P], R]:
    """Rematerialise the method `call` of a block by the policy that `block.remat` names in REMAT.

    The numbers are the same.
    """

    @functools.wraps(call)
    def call_with_remat(block: Any, *arrays: P.args, **named: P.kwargs) -> R:
        apply = functools.partial(call, block)
        policy = REMAT[block.remat]
        if policy is None:
            return apply(*arrays, **named)
        arrays, named = save_between_blocks((arrays, named))
        return jax.checkpoint(apply, policy=policy)(*arrays, **named)

    return call_with_remat
