"""Config: which weights of a diffusion model are trained."""

import dataclasses

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, positive
from jaxdiff.training.config.aliases import config_section


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    """All weights of the UNet; with text encoders, paths begin with the network's name."""

    text_encoders: bool = False  # whether to train the text encoders too
    from_scratch: bool = False  # whether to initialise the pipeline's UNet at random


@config_section("objective.trainable")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank updates of some layers (2106.09685); all weights are frozen.

    Modules are named by the ends of their paths, such as `to_q` or `attn2.to_k`.
    """

    rank: int = 8
    alpha: float | None = None  # updates are multiplied by alpha / rank; None: by 1
    # of the network that denoises; None: the projections of its attention
    target_modules: tuple[str, ...] | None = None
    text_target_modules: tuple[str, ...] = ()  # of the text encoders, such as q_proj and v_proj

    def __post_init__(self) -> None:
        positive("objective.trainable.rank", self.rank)
        if self.alpha is not None:
            positive("objective.trainable.alpha", self.alpha)
        if self.target_modules == () and not self.text_target_modules:
            raise InputError("objective.trainable.target_modules: got none, expected some modules")

    @property
    def scale(self) -> float:
        """The factor of the product of the two matrices."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@config_section("objective.trainable")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextualInversion:
    """Embeddings of a new token (2208.01618); all weights are frozen."""

    placeholder_token: str  # the new token in captions; no tokenizer may know it yet
    initializer_token: str  # a word of one token, whose embedding is the initial value
    num_vectors: int = 1  # embeddings of the token

    def __post_init__(self) -> None:
        if not self.placeholder_token or any(
            c.isspace() or c in "()[]\\/" for c in self.placeholder_token
        ):
            raise InputError(
                f"objective.trainable.placeholder_token: got {self.placeholder_token!r}, "
                "expected one without spaces, brackets and slashes"
            )
        in_range("objective.trainable.num_vectors", self.num_vectors, 1, 64)


Trainable = Full | LoRA | TextualInversion
