"""The config of T5's encoder: transformers' fields that say what the network is."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of, positive

# feed_forward_proj -> the names that dense_act_fn has for its activation.
FEED_FORWARDS: dict[str, tuple[str, ...]] = {
    "relu": ("relu",),
    "gated-gelu": ("gelu_new", "gelu_pytorch_tanh"),  # version 1.1: gelu's tanh form
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """T5's encoder, with the defaults of transformers."""

    NO_EFFECT: ClassVar[Mapping[str, str]] = {
        "is_encoder_decoder": "there is no decoder",
        "eos_token_id": "the tokenizer decides",
    }

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64  # width of an attention head
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # tokens; all beyond are in one bucket
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None  # None: as feed_forward_proj says, and so for the next
    is_gated_act: bool | None = None
    pad_token_id: int = 0
    eos_token_id: int | None = 1
    is_encoder_decoder: bool = True

    def __post_init__(self) -> None:
        """Refuse sizes that make no network, and activations that contradict each other."""
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        for name in sizes:
            positive(name, getattr(self, name))
        one_of("feed_forward_proj", self.feed_forward_proj, FEED_FORWARDS)
        activations = FEED_FORWARDS[self.feed_forward_proj]
        for name, choices in (("dense_act_fn", activations), ("is_gated_act", (self.gated,))):
            if getattr(self, name) is None:
                object.__setattr__(self, name, choices[0])
            one_of(name, getattr(self, name), choices)
        buckets = self.relative_attention_num_buckets
        distance = self.relative_attention_max_distance
        if buckets < 4 or buckets % 2:
            raise InputError(
                f"relative_attention_num_buckets: got {buckets}, expected an even number from 4"
            )
        if distance <= buckets // 4:
            raise InputError(
                f"relative_attention_max_distance: got {distance}, expected more than "
                f"{buckets // 4}, a quarter of the buckets"
            )

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layers are gated, as those of version 1.1 are."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states."""
        return self.d_model
