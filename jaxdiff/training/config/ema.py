"""The config of averages of the weights."""

import dataclasses

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, non_negative
from jaxdiff.training.config.aliases import config_section


@config_section("ema")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """The EMA that is sampled from and exported, and power-function EMAs for post-hoc EMA."""

    decay: float = 0.999  # of the exponential moving average
    warmup: bool = True  # whether to shorten the average at the start of training
    # Relative standard deviations (sigma_rel, above 0 and at most 0.28) of power-function EMAs that
    # are kept too (EDM2, 2312.02696, section 3). From two or more any other can be exported later.
    power_stds: tuple[float, ...] = ()
    snapshot_every: int = 0  # steps between snapshots of these; 0 without power_stds

    def __post_init__(self) -> None:
        in_range("ema.decay", self.decay, 0, 1)
        non_negative("ema.snapshot_every", self.snapshot_every)
        for std in self.power_stds:
            in_range("ema.power_stds", std, 0.001, 0.28)
        if len(set(self.power_stds)) != len(self.power_stds) or len(self.power_stds) == 1:
            raise InputError(
                f"ema.power_stds: got {self.power_stds}, expected none or several, all other"
            )
        if bool(self.power_stds) != bool(self.snapshot_every):
            raise InputError(
                f"ema.snapshot_every: got {self.snapshot_every} for ema.power_stds "
                f"{self.power_stds}, expected both or neither"
            )
