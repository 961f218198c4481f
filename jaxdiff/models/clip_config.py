"""The configs of CLIP's two encoders: transformers' fields that say what the network is."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of, positive
from jaxdiff.nn.activations import ACTIVATIONS


def _check_sizes(config: "CLIPTextConfig | CLIPVisionConfig") -> None:
    one_of("hidden_act", config.hidden_act, ACTIVATIONS)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        positive(name, getattr(config, name))
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"num_attention_heads: got {config.num_attention_heads}, "
            f"expected a divisor of hidden_size {config.hidden_size}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """A text encoder, with the defaults of transformers."""

    NO_EFFECT: ClassVar[Mapping[str, str]] = {
        "pad_token_id": "the tokenizer decides",
        "bos_token_id": "the tokenizer decides",
    }

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int | None = 512  # only read by models with a projection
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1  # informative; the tokenizer decides
    bos_token_id: int | None = 49406  # informative; the tokenizer decides
    eos_token_id: int = 49407  # where `pooled` is taken; 2 stands for "the largest id"

    def __post_init__(self) -> None:
        """Refuse sizes that make no network."""
        _check_sizes(self)
        positive("vocab_size", self.vocab_size)
        positive("max_position_embeddings", self.max_position_embeddings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """An image encoder, with the defaults of transformers."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int | None = 512  # only read by models with a projection
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels along a side
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse sizes that make no network."""
        _check_sizes(self)
        positive("patch_size", self.patch_size)
        if self.image_size < self.patch_size:
            raise InputError(
                f"image_size: got {self.image_size}, expected at least patch_size {self.patch_size}"
            )

    @property
    def noise_steps(self) -> int | None:
        """How many steps of noise a tower for noisy images knows; None for all others."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyCLIPVisionConfig(CLIPVisionConfig):
    """An encoder of noisy images, as GLIDE guides with; transformers has no such."""

    num_timesteps: int = 1000  # the noise of each of them has a class token of its own

    def __post_init__(self) -> None:
        """Refuse sizes that make no network."""
        super().__post_init__()
        positive("num_timesteps", self.num_timesteps)

    @property
    def noise_steps(self) -> int | None:
        """How many steps of noise the tower knows."""
        return self.num_timesteps
