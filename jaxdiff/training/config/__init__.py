"""What a training is: one frozen tree of choices, checked when it is made.

A file in `configs/` defines `config = TrainConfig(...)`; the command line overrides its fields.
"""

import dataclasses
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import DTYPES
from jaxdiff.core.validate import in_range, non_negative, one_of, positive
from jaxdiff.training.config.data import DATA_FIELDS, PICTURES, DataConfig
from jaxdiff.training.config.ema import EMAConfig
from jaxdiff.training.config.mesh import MESHES, MeshConfig
from jaxdiff.training.config.objectives import (
    OF_PIPELINE,
    ClassifierObjective,
    CLIPObjective,
    DiffusionObjective,
    DistillationObjective,
    Objective,
    VAEObjective,
)
from jaxdiff.training.config.optimiser import OptimiserConfig
from jaxdiff.training.config.trainable import Full, LoRA, TextualInversion, Tuning

__all__ = [
    "DATA_FIELDS",
    "MESHES",
    "PICTURES",
    "CLIPObjective",
    "ClassifierObjective",
    "DataConfig",
    "DiffusionObjective",
    "DistillationObjective",
    "EMAConfig",
    "Full",
    "LoRA",
    "MeshConfig",
    "Objective",
    "OptimiserConfig",
    "TextualInversion",
    "TrainConfig",
    "Tuning",
    "VAEObjective",
    "identity",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training, complete: with the same code it gives the same weights."""

    objective: Objective
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimiser: OptimiserConfig = dataclasses.field(default_factory=OptimiserConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    steps: int  # optimiser steps in all
    batch_size: int  # pictures per step over all devices
    accumulate: int = 1  # parts in which a batch is computed one after another, to save memory
    seed: int = 0  # of the initial weights and of all noise
    dtype: str = "float32"  # in which the networks compute; weights are float32
    ema: EMAConfig = dataclasses.field(default_factory=EMAConfig)
    log_every: int = 50  # steps between lines of the log, which are means over those steps
    checkpoint_every: int = 1000  # steps between checkpoints
    sample_every: int = 2000  # steps between sample grids; 0 makes none
    tensorboard: bool = True  # whether the log is written for TensorBoard too
    wandb: str | None = None  # project at Weights & Biases that is told as well
    keep: int = 2  # newest checkpoints that stay
    max_skipped: int = 10  # steps in a row with a loss or gradient not finite that end the training

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "batch_size",
            "log_every",
            "checkpoint_every",
            "keep",
            "max_skipped",
            "accumulate",
        )
        for name in counts:
            positive(name, getattr(self, name))
        in_range("seed", self.seed, 0, 2**31 - 1)
        if self.data.items is not None:
            raise InputError(
                f"data.items: got {self.data.items}, expected it left out: a training goes through "
                "new scenes for as long as it lasts"
            )
        non_negative("sample_every", self.sample_every)
        one_of("dtype", self.dtype, DTYPES)
        if self.batch_size % self.accumulate:
            raise InputError(
                f"accumulate: got {self.accumulate}, "
                f"expected a divisor of batch_size, {self.batch_size}"
            )
        if self.accumulate > 1 and isinstance(self.objective, CLIPObjective):
            raise InputError(
                f"accumulate: got {self.accumulate}, expected 1: captions are told from those of "
                "the whole batch"
            )
        if self.batch_size % self.data.variations:
            raise InputError(
                f"batch_size: got {self.batch_size}, "
                f"expected a multiple of data.variations, {self.data.variations}"
            )


# The fields of each objective that fix its parameters and what they mean.
_IDENTITY: dict[type, tuple[str, ...]] = {
    VAEObjective: ("model", "only_decoder", "adversarial", "discriminator"),
    CLIPObjective: ("text", "vision", "projection_dim", "heads"),
    DiffusionObjective: ("model", "schedule", "prediction_type", "train"),
    DistillationObjective: ("scale_width",),
    ClassifierObjective: ("model", "schedule"),
}


def identity(config: TrainConfig) -> dict[str, Any]:
    """What must not change when a training goes on: dotted field name -> value, JSON-like.

    That is the model, the seed, and the optimiser with what it leaves frozen. Learning rates, loss
    weights, intervals and the number of steps may change. What a pipeline says is not known here:
    the experiment adds it.
    """
    objective = config.objective
    values: dict[str, Any] = {
        "objective": type(objective).__name__,
        "seed": config.seed,
        "optimiser.name": config.optimiser.name,
        "ema.widths": list(config.ema.widths),
        "optimiser.groups with 0": [pattern for pattern, f in config.optimiser.groups if f == 0],
    }
    elsewhere = OF_PIPELINE if getattr(objective, "pipeline", None) else ()
    for name in (n for n in _IDENTITY[type(objective)] if n not in elsewhere):
        value = getattr(objective, name)
        if name == "train":
            values["objective.train"] = type(value).__name__
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.asdict(value)
            values |= {f"objective.{name}.{key}": item for key, item in fields.items()}
        else:
            values[f"objective.{name}"] = value
    return values
