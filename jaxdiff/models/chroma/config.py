"""The config of ChromaTransformer2DModel, by diffusers' fields."""

import dataclasses

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import positive
from jaxdiff.models.flux.config import FluxTokensConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChromaTransformer2DConfig(FluxTokensConfig):
    """The fields of a diffusers ChromaTransformer2DModel config.json, with its defaults."""

    # of the network that makes the modulation of all blocks: its inputs, width and depth
    approximator_num_channels: int = 64
    approximator_hidden_dim: int = 5120
    approximator_layers: int = 5

    def __post_init__(self) -> None:
        """Refuse what the network here cannot do."""
        super().__post_init__()
        positive("approximator_hidden_dim", self.approximator_hidden_dim)
        if self.approximator_num_channels % 8:
            raise InputError(
                f"approximator_num_channels: got {self.approximator_num_channels}, "
                "expected a multiple of 8"
            )

    @property
    def num_modulations(self) -> int:
        """Vectors that modulate: 3 for single blocks, 12 for double ones, 2 for the end."""
        return 3 * self.num_single_layers + 12 * self.num_layers + 2
