"""Sharding rules of weights: tables of (pattern, mesh axes of the last two dimensions).

The first pattern that is found in a weight's dotted path decides. Kernels end in (in, out), linear
and convolutional ones alike. Two products in a row split the width between them over "tensor", the
first by its outputs and the second by its inputs, so that one sum over the devices follows each
pair (Megatron-LM, 1909.08053, section 3). "fsdp" takes the other dimension: a device keeps its
shard and gathers the others when the weight is used (ZeRO, 1910.02054, stage 3).

An axis that does not divide its dimension is not used there; "fsdp" then takes the longest
dimension that it divides. Weights without a rule (biases, norms) are whole everywhere.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxdiff.core.types import Array, PyTree
from jaxdiff.parallel.mesh import FSDP, TENSOR

Axis = str | None
Rules = tuple[tuple[str, tuple[Axis, Axis]], ...]

COLUMN_PARALLEL, ROW_PARALLEL, FSDP_ONLY = (FSDP, TENSOR), (TENSOR, FSDP), (None, FSDP)
UNET: Rules = (
    (
        r"\.(to_[qkv]|add_[kv]_proj|net\.0\.proj|conv1|time_emb_proj|linear_1)\.kernel$",
        COLUMN_PARALLEL,
    ),
    (r"\.(to_out\.0|net\.2|conv2|linear_2)\.kernel$", ROW_PARALLEL),
    (r"\.(kernel|embedding)$", FSDP_ONLY),
)
VAE: Rules = (
    (r"\.(to_[qkv]|conv1)\.kernel$", COLUMN_PARALLEL),
    (r"\.(to_out\.0|conv2)\.kernel$", ROW_PARALLEL),
    (r"kernel$", FSDP_ONLY),
)
CLIP: Rules = (
    (r"\.([qkv]_proj|fc1)\.kernel$", COLUMN_PARALLEL),
    (r"\.(out_proj|fc2)\.kernel$", ROW_PARALLEL),
    (r"embedding$", FSDP_ONLY),
    (r"kernel$", FSDP_ONLY),
)
T5: Rules = (
    (r"\.(SelfAttention\.[qkv]|wi(_[01])?)\.kernel$", COLUMN_PARALLEL),
    (r"\.(SelfAttention\.o|wo)\.kernel$", ROW_PARALLEL),
    (r"embedding$", FSDP_ONLY),
    (r"kernel$", FSDP_ONLY),
)
BERT: Rules = (
    (r"\.(query|key|value|intermediate\.dense)\.kernel$", COLUMN_PARALLEL),
    (r"\.output\.dense\.kernel$", ROW_PARALLEL),
    (r"embeddings?$", FSDP_ONLY),
    (r"kernel$", FSDP_ONLY),
)
# The linear layers of adaptive norms, whose outputs are shifts, scales and gates.
MODULATION: Rules = ((r"\.(norm\w*|adaln_single)\.linear\.kernel$", COLUMN_PARALLEL),)
DIT: Rules = (
    *MODULATION,
    *UNET[:2],
    (r"embed(ding)?$", FSDP_ONLY),
    (r"kernel$", FSDP_ONLY),
)
MMDIT: Rules = (
    *MODULATION,
    (r"\.(to_[qkv]|add_[qkv]_proj|net\.0\.proj|linear_1)\.kernel$", COLUMN_PARALLEL),
    (r"\.(to_out\.0|to_add_out|net\.2|linear_2)\.kernel$", ROW_PARALLEL),
    (r"(kernel|\.pos_embed)$", FSDP_ONLY),
)
FLUX: Rules = (
    *MODULATION,
    (r"\.(to_[qkv]|add_[qkv]_proj|net\.0\.proj|proj_mlp|linear_1)\.kernel$", COLUMN_PARALLEL),
    # the inputs of a single block's proj_out are those of attention and perceptron, side by side
    (r"(to_out\.0|to_add_out|net\.2|linear_2|blocks\.\d+\.proj_out)\.kernel$", ROW_PARALLEL),
    (r"\.kernel$", FSDP_ONLY),
)
CLASSIFIER: Rules = (*UNET[:2], (r"kernel$", FSDP_ONLY))
# Tables of which a forward pass uses a part: it is taken of the shards.
_SLICED = re.compile(r"(^|\.)pos_embed$")
# For weights of several models, which share no names but these.
ANY: Rules = (*UNET[:2], *FLUX[:3], *T5[:2], *BERT[:2], *CLIP, *MMDIT[3:])


def spec(
    path: str, shape: tuple[int, ...], rules: Rules, sizes: Mapping[str, int]
) -> PartitionSpec:
    """How the weight at `path` is split over a mesh of these `sizes` by axis."""
    wanted = next((axes for pattern, axes in rules if re.search(pattern, path)), None)
    if wanted is None or len(shape) < len(wanted):
        return PartitionSpec()
    axes: list[Axis] = [None] * (len(shape) - len(wanted)) + list(wanted)
    axes = [axis if axis and sizes[axis] > 1 else None for axis in axes]
    pairs = list(zip(axes, shape, strict=True))
    fits = [axis is None or size % sizes[axis] == 0 for axis, size in pairs]
    moved = FSDP in axes and not fits[axes.index(FSDP)]
    axes = [axis if fit else None for axis, fit in zip(axes, fits, strict=True)]
    if moved:
        free = [i for i, axis in enumerate(axes) if not axis and not shape[i] % sizes[FSDP]]
        if free:
            axes[max(free, key=lambda i: shape[i])] = FSDP
    return PartitionSpec(*axes)


def shardings(shapes: Mapping[str, Any], rules: Rules, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each weight of a flat table from dotted path to array or shape."""
    return {
        path: NamedSharding(mesh, spec(path, tuple(leaf.shape), rules, mesh.shape))
        for path, leaf in shapes.items()
    }


def all_gather_fsdp(weights: PyTree, parts: PyTree, *, reduce_at_once: bool = False) -> PyTree:
    """`weights`, sharded as in `parts`, gathered along "fsdp" where they are used.

    Their gradients are reduced and sharded like the weights. Left to itself the
    compiler would rather cut a product into one for each part of its weight as it arrives or
    leaves, too narrow for a matrix unit. A table of positions is left as it is: a network uses a
    small part of it, which the compiler cuts out before it gathers. With `reduce_at_once` no
    gradient is kept whole until the optimiser reads its part.
    """

    def whole(part: NamedSharding) -> NamedSharding:
        axes = [None if axis == FSDP else axis for axis in part.spec]
        return NamedSharding(part.mesh, PartitionSpec(*axes))

    def fetch(path: tuple[Any, ...], weight: Array, part: NamedSharding) -> Array:
        if FSDP not in part.spec or _SLICED.search(_name(path)):
            return weight

        @jax.custom_vjp
        def move(x: Array) -> Array:
            return lax.with_sharding_constraint(x, whole(part))

        def back(_: None, gradient: Array) -> tuple[Array]:
            reduced = lax.with_sharding_constraint(move(gradient), part)
            return (lax.optimization_barrier(reduced) if reduce_at_once else reduced,)

        move.defvjp(lambda x: (move(x), None), back)
        return move(weight)

    return jax.tree_util.tree_map_with_path(fetch, weights, parts)


def infer_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of a tree that holds weights of any models by path, and other arrays."""

    def part(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return infer_sharding(_name(path), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(part, tree)


def _name(path: tuple[Any, ...]) -> str:
    """The keys of tables on the path of a leaf, with dots between them."""
    return ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def infer_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of the weight at `path` of any model."""
    return NamedSharding(mesh, spec(path, tuple(shape), ANY, mesh.shape))


def fit_sharding(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """`sharding` for an array of another shape, whole along what it cannot split equally."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = (*sharding.spec, *(None,) * len(shape))[: len(shape)]
    fits = [
        axis is None or n % sharding.mesh.shape[axis] == 0
        for axis, n in zip(axes, shape, strict=True)
    ]
    axes = [axis if fit else None for axis, fit in zip(axes, fits, strict=True)]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def optimizer_state_shardings(
    tree: PyTree, weights: Mapping[str, Any], rules: Rules, mesh: Mesh
) -> PyTree:
    """Shardings of a tree that holds, among others, tables like that of `weights`.

    A leaf under a weight's path and of its shape, such as a mean of its gradients, lies where the
    weight does; all others are whole everywhere.
    """
    parts = shardings(weights, rules, mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in parts]
        if names and tuple(weights[names[-1]].shape) == tuple(leaf.shape):
            return parts[names[-1]]
        return whole

    return jax.tree_util.tree_map_with_path(place, tree)
