"""Which weights of a diffusion model are trained."""

import dataclasses

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    """All weights of the UNet. With the text encoders' paths begin with `unet.` and theirs."""

    text_encoders: bool = False  # whether those of the text encoders are trained too
    from_scratch: bool = False  # whether a pipeline's UNet begins at random, the rest as it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank changes of some matrices (2106.09685); all weights stay what they are.

    Modules are named by the ends of their paths, such as `to_q` or `attn2.to_k`.
    """

    rank: int = 8
    alpha: float | None = None  # changes are multiplied by alpha / rank; None: by 1
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # modules of the UNet
    text_targets: tuple[str, ...] = ()  # of the text encoders, such as q_proj, v_proj

    def __post_init__(self) -> None:
        positive("objective.train.rank", self.rank)
        if self.alpha is not None:
            positive("objective.train.alpha", self.alpha)
        if not self.targets and not self.text_targets:
            raise InputError("objective.train.targets: got none, expected modules to change")

    @property
    def scale(self) -> float:
        """What stands before the product of the factors."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextualInversion:
    """Vectors that stand for a new word (2208.01618); all weights stay what they are."""

    word: str  # what captions call it; the tokenizers must not know it
    begin: str  # a word of one token whose vector they begin with
    vectors: int = 1

    def __post_init__(self) -> None:
        if not self.word or any(c.isspace() or c in "()[]\\/" for c in self.word):
            raise InputError(
                f"objective.train.word: got {self.word!r}, expected one without spaces, brackets "
                "and slashes"
            )
        in_range("objective.train.vectors", self.vectors, 1, 64)


Tuning = Full | LoRA | TextualInversion
