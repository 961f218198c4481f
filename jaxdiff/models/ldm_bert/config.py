"""The config of LDMBertModel: diffusers' fields that say what the network is."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from jaxdiff.core.configs import check_unsupported
from jaxdiff.core.validate import one_of, positive
from jaxdiff.nn.activations import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class LDMBertConfig:
    """The text encoder, with the defaults of diffusers, which are the published model's."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[bool, ...]]] = {"scale_embedding": (False,)}
    NO_EFFECT: ClassVar[Mapping[str, str]] = {"pad_token_id": "padding takes part"}

    vocab_size: int = 30522
    max_position_embeddings: int = 77
    encoder_layers: int = 32
    encoder_ffn_dim: int = 5120
    encoder_attention_heads: int = 8
    head_dim: int = 64
    activation_function: str = "gelu"
    d_model: int = 1280
    scale_embedding: bool = False
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that make no network."""
        check_unsupported(self)
        one_of("activation_function", self.activation_function, ACTIVATIONS)
        for field in dataclasses.fields(self)[:6]:
            positive(field.name, getattr(self, field.name))
        positive("d_model", self.d_model)

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states."""
        return self.d_model
