"""LoRA on a network: target layers get low-rank factors beside their kernels."""

from collections.abc import Sequence
from typing import Any, TypeVar

from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import param_dict
from jaxdiff.nn.layers import Conv, Linear
from jaxdiff.nn.lora import LoRAConv, LoRALinear

M = TypeVar("M", bound=nnx.Module)
# Of the image's tokens, and of the text's in networks with two streams.
PROJECTIONS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
LORA_SUFFIXES = (".lora_A.kernel", ".lora_B.kernel")  # of the paths of factors


def attention_projections(module: nnx.Module) -> tuple[str, ...]:
    """The ends of the paths of the projections in a network's attention layers."""
    return tuple(name for name in PROJECTIONS if layers_of(module, name))


def layers_of(module: nnx.Module, target: str) -> list[str]:
    """The paths of layers with a kernel that end in `target`."""
    end = f".{target}.kernel"
    return [path.removesuffix(".kernel") for path in param_dict(module) if f".{path}".endswith(end)]


def inject_lora(
    module: M,
    target_modules: Sequence[str],
    *,
    rank: int,
    scale: float,
    exclude: tuple[str, ...] = (),
) -> M:
    """A copy of an abstract `module` with LoRA layers where a path ends in a target.

    Paths that begin with one of `exclude` are left out. InputError for a target that is no layer's.
    """
    copy = nnx.clone(module)
    for target in target_modules:
        found = [path for path in layers_of(module, target) if not path.startswith(exclude)]
        if not found:
            raise InputError(
                f"objective.trainable.target_modules: got {target!r}, expected the end of a "
                f"layer's path in {type(module).__name__}"
            )
        for path in found:
            _inject(copy, path, rank, scale)
    return copy


def is_lora_param(path: str) -> bool:
    """Whether the weight at `path` is a LoRA's."""
    return path.endswith(LORA_SUFFIXES)


def _inject(module: Any, path: str, rank: int, scale: float) -> None:
    """Put a layer with factors in the place of the one at `path`."""
    *parents, last = path.split(".")
    for name in parents:
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    layer = module[int(last)] if last.isdigit() else getattr(module, last)
    if isinstance(layer, LoRALinear | LoRAConv):  # two targets name it
        return
    if not isinstance(layer, Linear | Conv):
        raise InputError(
            f"objective.trainable.target_modules: got {path}, expected a layer with a kernel"
        )
    changed = LoRALinear if isinstance(layer, Linear) else LoRAConv
    new: Any = changed(layer, rank, scale)  # pyright: ignore[reportArgumentType]
    if last.isdigit():
        module[int(last)] = new
    else:
        setattr(module, last, new)
