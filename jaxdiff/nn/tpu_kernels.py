"""What the kernels for TPUs share: tokens as columns, blocks of them, programs for several devices.

Inside kernels for heads, arrays are (heads, head width, tokens), those of one image after those of
another: tokens fill the 128 lanes of a register, as a head's width seldom does, and the products
before and after attention write and read this order, so that nothing is copied to change it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxdiff.core.types import Array, Float

# Of a mesh, by the convention of the package: what shares a batch, and what shares the heads.
BATCH_AXES, HEAD_AXIS = ("data", "fsdp", "guidance"), "tensor"
BATCH, HEADS = "batch", "heads"  # axes of arrays
Axes = Sequence[tuple[str | None, ...]]
BY_HEAD = (BATCH, None, HEADS, None)  # the axes of queries, keys and values
LANES = 128


def on_each_device(kernel: Callable[..., Array], operands: Sequence[Array], axes: Axes) -> Array:
    """`kernel(*operands)`, which gives an array like the first, as each device computes it.

    `axes` say of each operand which of its axes are BATCH and HEADS; all devices have all of the
    others. The compiler cannot divide a kernel among devices. In a program for several, it must be
    called under a mesh, and runs on each device's part of the batch (BATCH_AXES) and of the heads
    ("tensor"), or from within `jax.shard_map` or `jax.pmap`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names or set(mesh.manual_axes) == set(mesh.axis_names):
        return kernel(*operands)
    lengths = dict(zip(axes[0], operands[0].shape, strict=True))
    specs = partition_specs(axes, lengths, mesh.shape)
    # Of the kernel's results nothing is known to the check of varying axes.
    divided = jax.shard_map(kernel, in_specs=specs, out_specs=specs[0], check_vma=False)
    return cast(Array, divided(*operands))


def partition_specs(
    axes: Axes, lengths: Mapping[str | None, int], sizes: Mapping[str, int]
) -> tuple[PartitionSpec, ...]:
    """How arrays with these axes are split over a mesh of these sizes.

    They are whole along an axis whose length, in `lengths`, the mesh does not divide.
    """
    batch = tuple(axis for axis in BATCH_AXES if sizes.get(axis, 1) > 1)
    heads = HEAD_AXIS if sizes.get(HEAD_AXIS, 1) > 1 else None
    while lengths[BATCH] % math.prod(sizes[axis] for axis in batch):
        batch = batch[:-1]
    if heads and lengths.get(HEADS, 1) % sizes[heads]:
        heads = None
    split = {BATCH: batch or None, HEADS: heads, None: None}
    return tuple(PartitionSpec(*(split[axis] for axis in each)) for each in axes)


def whole_registers(tokens: int) -> int:
    """The number of columns that `tokens` of an image take."""
    return LANES * math.ceil(tokens / LANES)


def as_columns(x: Float[Array, "b _ h d"]) -> Float[Array, "h d all"]:
    """All tokens as columns, zeros filling those of each image up to whole registers."""
    length = whole_registers(x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
    columns = len(x) * length
    return x.reshape(columns, -1).T.reshape(*x.shape[2:], columns)


def as_tokens(columns: Float[Array, "h d all"], batch: int, tokens: int) -> Float[Array, "b _ h d"]:
    """The inverse of `as_columns` for so many images of so many tokens."""
    heads, width, length = columns.shape
    # Heads and their width go through one axis, or the compiler takes a way over a copy.
    rows = columns.reshape(heads * width, length).T
    return rows.reshape(batch, length // batch, heads, width)[:, :tokens]


def divisor(length: int, most: int) -> int:
    """The largest number of whole registers up to `most` that divides `length`, which some do."""
    registers = length // LANES
    return LANES * max(i for i in range(1, max(most // LANES, 1) + 1) if registers % i == 0)
