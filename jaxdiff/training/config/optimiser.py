"""How weights follow their gradients."""

import dataclasses
import re

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, non_negative, one_of, positive

DECAYS = ("linear", "cosine")
# The fields that count for each optimiser, beside those of the schedule.
OPTIMISERS: dict[str, set[str]] = {
    "adamw": {"beta1", "beta2", "epsilon"},
    "adafactor": set(),
    "lion": {"beta1", "beta2"},
    "muon": {"beta1", "beta2", "epsilon", "momentum"},
}
_OWN = set[str]().union(*OPTIMISERS.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """An optimiser, its schedule, and which weights follow it how fast."""

    name: str = "adamw"  # adamw, adafactor, lion or muon
    learning_rate: float = 1e-3  # after the warm-up
    beta1: float = 0.9  # decay of the mean of the gradients
    beta2: float = 0.99  # decay of the mean of their squares; of lion's slower mean
    epsilon: float = 1e-8  # added to the root of the latter
    momentum: float = 0.95  # decay of the mean of the gradients that muon makes orthogonal
    weight_decay: float = 0.01  # of matrices and kernels, times the learning rate
    # (pattern of the dotted path, factor of the learning rate); the first that is found counts, and
    # what has the factor 0 is frozen
    groups: tuple[tuple[str, float], ...] = ()
    warmup_steps: int = 500  # of linear rise from nothing
    decay: str = "cosine"  # shape of the fall at the end: linear or cosine
    decay_fraction: float = 0.2  # share of all steps that the fall takes; 0 keeps the rate constant
    final_fraction: float = 0.0  # share of the learning rate that is left at the very end
    clip_norm: float = 1.0  # gradients whose global norm is larger are scaled down to it

    def __post_init__(self) -> None:
        one_of("optimiser.name", self.name, OPTIMISERS)
        positive("optimiser.learning_rate", self.learning_rate)
        for name in ("beta1", "beta2", "momentum"):
            in_range(f"optimiser.{name}", getattr(self, name), 0, 0.9999999)
        positive("optimiser.epsilon", self.epsilon)
        non_negative("optimiser.weight_decay", self.weight_decay)
        non_negative("optimiser.warmup_steps", self.warmup_steps)
        one_of("optimiser.decay", self.decay, DECAYS)
        in_range("optimiser.decay_fraction", self.decay_fraction, 0, 1)
        in_range("optimiser.final_fraction", self.final_fraction, 0, 1)
        positive("optimiser.clip_norm", self.clip_norm)
        for field in dataclasses.fields(self):
            value, unused = getattr(self, field.name), field.name in _OWN - OPTIMISERS[self.name]
            if unused and value != field.default:
                raise InputError(
                    f"optimiser.{field.name}: got {value}, expected it left out for {self.name}"
                )
        for pattern, factor in self.groups:
            non_negative("optimiser.groups", factor)
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"optimiser.groups: got {pattern!r}, expected a regular expression ({error})"
                ) from None
