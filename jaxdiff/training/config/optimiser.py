"""How weights follow their gradients."""

import dataclasses

from jaxdiff.core.validate import in_range, not_negative, one_of, positive

DECAYS = ("linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW (1711.05101) and its schedule."""

    learning_rate: float = 1e-3  # after the warm-up
    beta1: float = 0.9  # decay of the mean of the gradients
    beta2: float = 0.99  # decay of the mean of their squares
    epsilon: float = 1e-8  # added to the root of the latter
    weight_decay: float = 0.01  # of matrices and kernels, times the learning rate
    warmup_steps: int = 500  # of linear rise from nothing
    decay: str = "cosine"  # shape of the fall at the end: linear or cosine
    decay_fraction: float = 0.2  # share of all steps that the fall takes; 0 keeps the rate constant
    final_fraction: float = 0.0  # share of the learning rate that is left at the very end
    clip_norm: float = 1.0  # gradients whose global norm is larger are scaled down to it

    def __post_init__(self) -> None:
        positive("optimiser.learning_rate", self.learning_rate)
        in_range("optimiser.beta1", self.beta1, 0, 0.9999999)
        in_range("optimiser.beta2", self.beta2, 0, 0.9999999)
        positive("optimiser.epsilon", self.epsilon)
        not_negative("optimiser.weight_decay", self.weight_decay)
        not_negative("optimiser.warmup_steps", self.warmup_steps)
        one_of("optimiser.decay", self.decay, DECAYS)
        in_range("optimiser.decay_fraction", self.decay_fraction, 0, 1)
        in_range("optimiser.final_fraction", self.final_fraction, 0, 1)
        positive("optimiser.clip_norm", self.clip_norm)
