"""The config of the optimiser and its learning rate schedule."""

import dataclasses
import re
from collections.abc import Mapping
from typing import ClassVar

from jaxdiff.core.configs import Need
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, non_negative, one_of, positive
from jaxdiff.training.config.aliases import config_section

LR_DECAYS = ("linear", "cosine")
OPTIMISERS = ("adamw", "adafactor", "lion", "muon")


@config_section("optimiser")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """An optimiser, its learning rate schedule, and learning rate multipliers by weight."""

    needs: ClassVar[Mapping[str, Need]] = {
        "beta1": Need("name", ("adamw", "lion", "muon")),
        "beta2": Need("name", ("adamw", "lion", "muon")),
        "epsilon": Need("name", ("adamw", "muon")),
        "momentum": Need("name", ("muon",)),
        "min_lr_ratio": Need("decay_fraction"),
    }

    name: str = "adamw"  # adamw, adafactor, lion or muon
    learning_rate: float = 1e-3  # peak, after warm-up
    beta1: float = 0.9  # decay of the mean of gradients
    beta2: float = 0.99  # decay of the mean of squared gradients; for lion of the slower mean
    epsilon: float = 1e-8  # added to the root of the mean square
    momentum: float = 0.95  # of muon: decay of the mean of gradients that it orthogonalises
    weight_decay: float = 0.01  # of matrices and kernels; multiplied by the learning rate
    # (regular expression for dotted paths, multiplier of the learning rate); the first that matches
    # counts, and a multiplier of 0 freezes the weight
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    warmup_steps: int = 500  # of linear warm-up
    decay: str = "cosine"  # shape of the decay at the end: linear or cosine
    decay_fraction: float = 0.2  # fraction of all steps that decay; 0: constant rate
    min_lr_ratio: float = 0.0  # final learning rate over the peak
    clip_norm: float = 1.0  # maximal global norm of the gradients

    def __post_init__(self) -> None:
        one_of("optimiser.name", self.name, OPTIMISERS)
        positive("optimiser.learning_rate", self.learning_rate)
        for name in ("beta1", "beta2", "momentum"):
            in_range(f"optimiser.{name}", getattr(self, name), 0, 0.9999999)
        positive("optimiser.epsilon", self.epsilon)
        non_negative("optimiser.weight_decay", self.weight_decay)
        non_negative("optimiser.warmup_steps", self.warmup_steps)
        one_of("optimiser.decay", self.decay, LR_DECAYS)
        in_range("optimiser.decay_fraction", self.decay_fraction, 0, 1)
        in_range("optimiser.min_lr_ratio", self.min_lr_ratio, 0, 1)
        positive("optimiser.clip_norm", self.clip_norm)
        for pattern, factor in self.lr_multipliers:
            non_negative("optimiser.lr_multipliers", factor)
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"optimiser.lr_multipliers: got {pattern!r}, expected a regular expression "
                    f"({error})"
                ) from None
