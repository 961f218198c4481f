"""The rule table between PyTorch state-dict keys and module paths, and between their layouts.

Module attributes carry the names of diffusers and transformers, so two rules are enough:

| PyTorch                    | path ends in | PyTorch layout | ours     |
| -------------------------- | ------------ | -------------- | -------- |
| `weight`, 1-D (norms)      | `scale`      | (c,)           | (c,)     |
| `weight` of a lookup table | `embedding`  | (rows, width)  | the same |
| `weight`, 2-D (linear)     | `kernel`     | (out, in)      | (in, out)|
| `weight`, 4-D (convolution)| `kernel`     | OIHW           | HWIO     |
| anything else              | the same     | the same       | the same |

Paths are dotted ("down_blocks.0.resnets.0.norm1.scale"). Only numpy is needed here.
"""

import numpy as np

from jaxdiff.core.errors import InputError

# Modules whose 2-D weight is a table of vectors rather than a linear map.
EMBEDDINGS = frozenset(
    {
        "token_embedding",
        "position_embedding",
        "padding_embedding",  # GLIDE's, by position
        "shared",  # T5's tokens
        "word_embeddings",  # XLM-RoBERTa's, and the next two
        "position_embeddings",
        "token_type_embeddings",
        "embed_tokens",
        "embed_positions",
        "relative_attention_bias",
        "embedding_table",  # classes of DiT
        "class_embedding",  # classes or noise levels of a UNet
        "embedding",
    }
)

_LEAVES = frozenset({"kernel", "scale", "embedding"})
_TO_JAX = {2: (1, 0), 4: (2, 3, 1, 0)}
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}


def torch_key_to_path(key: str, ndim: int) -> str:
    """The module path of the PyTorch `key`, whose tensor has `ndim` dimensions."""
    parent, _, leaf = key.rpartition(".")
    if leaf != "weight":
        return key
    if parent.rpartition(".")[2] in EMBEDDINGS:
        return f"{parent}.embedding"
    return f"{parent}.scale" if ndim == 1 else f"{parent}.kernel"


def path_to_torch_key(path: str) -> str:
    """The PyTorch key of a module `path`: the inverse of `torch_key_to_path`."""
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.weight" if parent and leaf in _LEAVES else path


def to_jax(array: np.ndarray, path: str) -> np.ndarray:
    """A view of a PyTorch `array` in the layout of the module at `path`."""
    axes = _axes(path, array.ndim, _TO_JAX)
    return array if axes is None else array.transpose(axes)


def to_torch(array: np.ndarray, path: str) -> np.ndarray:
    """A view of the weight at `path` in PyTorch's layout: the inverse of `to_jax`."""
    axes = _axes(path, array.ndim, _TO_TORCH)
    return array if axes is None else array.transpose(axes)


def torch_shape(shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    """The shape that a weight of `shape` at `path` has in PyTorch."""
    axes = _axes(path, len(shape), _TO_TORCH)
    return shape if axes is None else tuple(shape[axis] for axis in axes)


def _axes(path: str, ndim: int, table: dict[int, tuple[int, ...]]) -> tuple[int, ...] | None:
    if path.rpartition(".")[2] != "kernel":
        return None
    if ndim not in table:
        raise InputError(f"{path}: got {ndim} dimensions, expected 2 (linear) or 4 (convolution)")
    return table[ndim]
