"""The config of PriorTransformer: diffusers' fields, and which of their values exist here."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxdiff.core.configs import check_unsupported
from jaxdiff.core.validate import one_of, positive
from jaxdiff.nn.activations import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorTransformerConfig:
    """The fields of a diffusers PriorTransformer config.json, with its defaults.

    InputError for values that ask for something that is not implemented.
    """

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "additional_embeddings": (4,),
        "dropout": (0.0,),
        "norm_in_type": (None,),
        "embedding_proj_norm_type": (None,),
        "encoder_hid_proj_type": ("linear",),
        "added_emb_type": ("prd",),
        "time_embed_dim": (None,),
        "clip_embed_dim": (None,),
    }

    num_attention_heads: int = 32
    attention_head_dim: int = 64  # width of a head
    num_layers: int = 20
    embedding_dim: int = 768  # of the image embeddings and of the text states
    num_embeddings: int = 77  # tokens of a text
    additional_embeddings: int = 4  # the pooled text, the time, the noisy embedding, the answer
    dropout: float = 0.0
    time_embed_act_fn: str = "silu"
    norm_in_type: str | None = None
    embedding_proj_norm_type: str | None = None
    encoder_hid_proj_type: str | None = "linear"
    added_emb_type: str | None = "prd"
    time_embed_dim: int | None = None
    embedding_proj_dim: int | None = None  # of the pooled text; None: embedding_dim
    clip_embed_dim: int | None = None

    def __post_init__(self) -> None:
        """Refuse what PriorTransformer here cannot do."""
        check_unsupported(self)
        one_of("time_embed_act_fn", self.time_embed_act_fn, ACTIVATIONS)
        for name in (
            "num_attention_heads",
            "attention_head_dim",
            "num_layers",
            "embedding_dim",
            "num_embeddings",
        ):
            positive(name, getattr(self, name))
        if self.embedding_proj_dim is not None:
            positive("embedding_proj_dim", self.embedding_proj_dim)

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text embeddings."""
        return self.embedding_proj_dim or self.embedding_dim

    @property
    def sample_size(self) -> int:
        """1: an embedding is one for a whole image."""
        return 1

    @property
    def channels(self) -> tuple[int, int]:
        """Widths of the noisy image embeddings and of the prediction."""
        return self.embedding_dim, self.embedding_dim
