"""Name tables of published transformers: in their original code, in diffusers, and how they differ.

`original/*.json.gz` has for each network `map`, which gives for a name in diffusers the original
name and how its tensor differs, and the shapes on both sides.
"""

import functools
import gzip
import json
import pathlib

import numpy as np

from jaxdiff.checkpoints.safetensors import TensorInfo

TABLES = pathlib.Path(__file__).parent / "checkpoints" / "original"
SMALL = 4  # width of a network whose shapes are made small


@functools.cache
def oracle(name):
    """The table of a network."""
    return json.loads(gzip.decompress((TABLES / f"{name}_transformer.json.gz").read_bytes()))


def entry(name, shape, path="x.safetensors"):
    """A float16 tensor in a file that is never opened."""
    nbytes = 2 * int(np.prod(shape))
    return TensorInfo(
        path=pathlib.Path(path),
        name=name,
        dtype="F16",
        shape=tuple(shape),
        start=0,
        nbytes=nbytes,
    )


def entries(shapes, prefix=""):
    """A file's table with these shapes."""
    return {prefix + name: entry(prefix + name, shape) for name, shape in shapes.items()}


def fraction(how, width, rows):
    """The rows, from and to, of the original tensor that a transform stands for."""
    if how.startswith("part"):
        number, count = map(int, how.removeprefix("part ").split("/"))
        return number * rows // count, (number + 1) * rows // count
    begin, end = (
        int(end.replace("D", "") or 1) if "D" in end else int(end)
        for end in how.removeprefix("rows ").split(":")
    )
    return begin * width, end * width


def small_arrays(table):
    """Random arrays of all original tensors, whose shapes are those of a narrow network."""
    width = hidden_size(table)
    rng = np.random.default_rng(0)

    def shrink(dim):
        return dim * SMALL // width if dim % width == 0 else 2

    return {
        name: rng.normal(size=[shrink(dim) for dim in shape]).astype(np.float32)
        for name, shape in table["original"].items()
    }


def hidden_size(table):
    """The width of a network."""
    return table["original"][next(n for n in table["original"] if n.endswith("linear.weight"))][1]


def converted(table, arrays):
    """The arrays under the names of diffusers, by the transforms of the table."""
    found = {}
    for name, (original, *how) in table["map"].items():
        values = arrays[original]
        if how == ["swap"]:
            values = np.concatenate(np.split(values, 2)[::-1])
        elif how:
            begin, end = fraction(how[0], SMALL, len(values))
            values = values[begin:end]
        found[name] = values
    return found
