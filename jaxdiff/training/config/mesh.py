"""The config of the device mesh."""

import dataclasses

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import positive
from jaxdiff.training.config.aliases import config_section


@config_section("mesh")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The mesh axes; the number of devices is data x fsdp x tensor."""

    data: int = -1  # groups that each hold all weights; -1: all remaining devices
    fsdp: int = 1  # devices that share the weights, each with its own part of the batch
    tensor: int = 1  # devices that share weights and work on the same part of the batch
    # whether weights gathered over fsdp are dropped after use and gathered again for the backward
    # pass: less memory and more to send. Needs objective.remat
    reshard_after_forward: bool = False

    def __post_init__(self) -> None:
        wanted = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in wanted.items():
            if size != -1:
                positive(f"mesh.{name}", size)
        if list(wanted.values()).count(-1) > 1:
            raise InputError(f"mesh: got {wanted}, expected at most one -1")
        if self.reshard_after_forward and self.fsdp == 1:
            raise InputError(
                "mesh.reshard_after_forward: got true with mesh.fsdp 1, expected it left out: "
                "weights that are not shared are not gathered"
            )


MESHES = {
    "replicate": MeshConfig(),
    "fsdp": MeshConfig(data=1, fsdp=-1),
    "fsdp+tensor": MeshConfig(data=1, fsdp=-1, tensor=4),
}
