"""The config of MultilingualCLIP: the fields that say what the network is."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from jaxdiff.core.configs import check_unsupported
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, one_of, positive
from jaxdiff.nn.activations import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultilingualCLIPConfig:
    """XLM-RoBERTa and a projection, with the defaults of transformers and diffusers."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "position_embedding_type": ("absolute",)
    }

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512  # of which a text has `max_tokens`
    type_vocab_size: int = 2  # kinds of tokens; all of a text are of the first
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1
    position_embedding_type: str = "absolute"
    transformerDimensions: int = 1024  # noqa: N815 - hidden_size once more, for the projection
    numDims: int = 768  # noqa: N815 - of the pooled embedding

    def __post_init__(self) -> None:
        """Refuse sizes that make no network."""
        check_unsupported(self)
        one_of("hidden_act", self.hidden_act, ACTIVATIONS)
        in_range("pad_token_id", self.pad_token_id, 0, self.vocab_size - 1)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "type_vocab_size",
            "numDims",
        ):
            positive(name, getattr(self, name))
        positive("max_position_embeddings - pad_token_id - 1", self.max_tokens)
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"num_attention_heads: got {self.num_attention_heads}, "
                f"expected a divisor of hidden_size {self.hidden_size}"
            )
        if self.transformerDimensions != self.hidden_size:
            raise InputError(
                f"transformerDimensions: got {self.transformerDimensions}, "
                f"expected hidden_size, {self.hidden_size}"
            )

    @property
    def max_tokens(self) -> int:
        """Tokens of a text: positions are counted from `pad_token_id` + 1."""
        return self.max_position_embeddings - self.pad_token_id - 1
