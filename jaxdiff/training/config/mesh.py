"""How devices share the work."""

import dataclasses

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share the work: their number is data x fsdp x tensor."""

    data: int = -1  # groups of devices that each hold all weights; -1 takes what the others leave
    fsdp: int = 1  # devices that share the weights, each with a part of the batch of its own
    tensor: int = 1  # devices that share the weights and the work on the same part of the batch

    def __post_init__(self) -> None:
        wanted = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in wanted.items():
            if size != -1:
                positive(f"mesh.{name}", size)
        if list(wanted.values()).count(-1) > 1:
            raise InputError(f"mesh: got {wanted}, expected at most one -1")


MESHES = {
    "replicate": MeshConfig(),
    "fsdp": MeshConfig(data=1, fsdp=-1),
    "fsdp+tensor": MeshConfig(data=1, fsdp=-1, tensor=4),
}
