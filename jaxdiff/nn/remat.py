"""Rematerialisation: what the forward pass saves for the backward pass, and what is recomputed."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxdiff.core.types import Array, PyTree

Gather = Callable[[str, Array], Array]  # path, shard -> the whole weight
P = ParamSpec("P")
R = TypeVar("R")
SAVED_NAME = "kept"
# The last is cuDNN's attention, which jax gives no other name.
MATMUL_PRIMITIVES = ("dot_general", "conv_general_dilated", "dot_product_attention_fwd_wrapper")
# Inside `regathering`: id of a gathered weight -> its shard, and what gathers that.
_SHARDS: contextvars.ContextVar[Mapping[int, tuple[Array, Callable[[Array], Array]]]] = (
    contextvars.ContextVar("shards")
)


def save_for_backward(value: PyTree) -> PyTree:
    """Mark `value` as saved by "products", although no matrix product computed it."""
    return jax.tree.map(lambda x: checkpoint_name(x, SAVED_NAME), value)


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


def remat(
    call: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[Any, P], R]:
    """Rematerialise the method `call` of a block by the policy that `block.remat` names in REMAT.

    The numbers are the same.
    """

    @functools.wraps(call)
    def call_with_remat(block: Any, *arrays: P.args, **named: P.kwargs) -> R:
        policy = REMAT[block.remat]
        if policy is None:
            return call(block, *arrays, **named)
        graph, weights = nnx.split(block)
        gathered, tree = jax.tree.flatten(weights)
        shards = _SHARDS.get({})
        sources = [shards.get(id(weight), (weight, _unchanged)) for weight in gathered]

        def apply(sharded: list[Array], *arrays: P.args, **named: P.kwargs) -> R:
            whole = [gather(w) for w, (_, gather) in zip(sharded, sources, strict=True)]
            return call(nnx.merge(graph, jax.tree.unflatten(tree, whole)), *arrays, **named)

        return jax.checkpoint(apply, policy=policy)([w for w, _ in sources], *arrays, **named)

    return call_with_remat


def _unchanged(weight: Array) -> Array:
    return weight


@contextlib.contextmanager
def regathering(
    gathered: Mapping[str, Array], shards: Mapping[str, Array], gather: Gather
) -> Iterator[None]:
    """Rematerialised blocks that are called with weights of `gathered` read `shards` instead.

    They gather them by themselves, and so once more in the backward pass, where nothing but the
    shards was kept. The keys are the paths of weights.
    """
    token = _SHARDS.set(
        {
            id(weight): (shards[path], functools.partial(gather, path))
            for path, weight in gathered.items()
        }
    )
    try:
        yield
    finally:
        _SHARDS.reset(token)
