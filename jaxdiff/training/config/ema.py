"""How weights are averaged."""

import dataclasses

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, non_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """The average that is sampled from and exported, and those from which others are made later."""

    decay: float = 0.999  # of the exponential average
    warmup: bool = True  # whether its memory is short while the training is young
    # Relative widths, above 0 and at most 0.28, of power-function averages that are kept beside it
    # (2312.02696, section 3); of two or more any width can be exported later.
    widths: tuple[float, ...] = ()
    snapshot_every: int = 0  # steps between snapshots of these; 0 without widths

    def __post_init__(self) -> None:
        in_range("ema.decay", self.decay, 0, 1)
        non_negative("ema.snapshot_every", self.snapshot_every)
        for width in self.widths:
            in_range("ema.widths", width, 0.001, 0.28)
        if len(set(self.widths)) != len(self.widths) or len(self.widths) == 1:
            raise InputError(f"ema.widths: got {self.widths}, expected none or several, all other")
        if bool(self.widths) != bool(self.snapshot_every):
            raise InputError(
                f"ema.snapshot_every: got {self.snapshot_every} for the widths {self.widths}, "
                "expected both or neither"
            )
