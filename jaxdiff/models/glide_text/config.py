"""The config of GlideTextModel; the original code has its values as arguments of the network."""

import dataclasses

from jaxdiff.core.validate import in_range, positive
from jaxdiff.models.clip_config import CLIPTextConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlideTextConfig:
    """The text encoder, with the values of the published models."""

    vocab_size: int = 50257
    hidden_size: int = 512
    num_hidden_layers: int = 16
    num_attention_heads: int = 8
    max_position_embeddings: int = 128
    projection_dim: int = 768  # of the pooled embedding, which joins that of the time
    pad_token_id: int = 50256  # positions with it have embeddings of their own

    def __post_init__(self) -> None:
        """Refuse sizes that make no network."""
        for name in ("vocab_size", "max_position_embeddings", "projection_dim"):
            positive(name, getattr(self, name))
        in_range("pad_token_id", self.pad_token_id, 0, self.vocab_size - 1)
        _ = self.layers

    @property
    def layers(self) -> CLIPTextConfig:
        """The layers of the transformer, which are CLIP's."""
        return CLIPTextConfig(
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            hidden_act="gelu",
        )
