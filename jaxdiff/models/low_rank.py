"""LoRA on a network: the layers that are named get low-rank factors beside their kernels."""

from collections.abc import Sequence
from typing import Any, TypeVar

from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import weights
from jaxdiff.nn.layers import Conv, Linear
from jaxdiff.nn.lora import LoRAConv, LoRALinear

M = TypeVar("M", bound=nnx.Module)
FACTORS = (".lora_A.kernel", ".lora_B.kernel")  # how the paths of factors end


def adapted(
    module: M, targets: Sequence[str], *, rank: int, scale: float, but: tuple[str, ...] = ()
) -> M:
    """A copy of an abstract `module` with factors in the layers whose paths end in a target.

    Paths that begin with one of `but` are left out. InputError for a target that is no layer's.
    """
    copy = nnx.clone(module)
    kernels = [p for p in weights(module) if p.endswith(".kernel") and not p.startswith(but)]
    layers = [path.removesuffix(".kernel") for path in kernels]
    for target in targets:
        found = [path for path in layers if f".{path}".endswith(f".{target}")]
        if not found:
            raise InputError(
                f"objective.train.targets: got {target!r}, expected the end of a layer's path in "
                f"{type(module).__name__}"
            )
        for path in found:
            _adapt(copy, path, rank, scale)
    return copy


def is_factor(path: str) -> bool:
    """Whether the weight at `path` is a LoRA's."""
    return path.endswith(FACTORS)


def _adapt(module: Any, path: str, rank: int, scale: float) -> None:
    """Put a layer with factors in the place of the one at `path`."""
    *parents, last = path.split(".")
    for name in parents:
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    layer = module[int(last)] if last.isdigit() else getattr(module, last)
    if isinstance(layer, LoRALinear | LoRAConv):  # two targets name it
        return
    if not isinstance(layer, Linear | Conv):
        raise InputError(f"objective.train.targets: got {path}, expected a layer with a kernel")
    changed = LoRALinear if isinstance(layer, Linear) else LoRAConv
    new: Any = changed(layer, rank, scale)  # pyright: ignore[reportArgumentType]
    if last.isdigit():
        module[int(last)] = new
    else:
        setattr(module, last, new)
