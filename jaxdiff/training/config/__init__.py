"""The config of a training: nested frozen dataclasses, validated when they are constructed.

A file in `configs/` defines `config = TrainConfig(...)`; the command line overrides its fields.
Old spellings of fields and options still work: see `aliases.py`.
"""

import dataclasses
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import DTYPES
from jaxdiff.core.validate import in_range, non_negative, one_of, positive
from jaxdiff.training.config.aliases import config_section
from jaxdiff.training.config.data import IMAGE_KINDS, PROCEDURAL_KINDS, DataConfig, data_fields
from jaxdiff.training.config.ema import EMAConfig
from jaxdiff.training.config.mesh import MESHES, MeshConfig
from jaxdiff.training.config.objectives import (
    PIPELINE_FIELDS,
    ClassifierObjective,
    CLIPObjective,
    DiffusionObjective,
    DistillationObjective,
    Objective,
    TimestepSampling,
    VAEObjective,
)
from jaxdiff.training.config.optimiser import OptimiserConfig
from jaxdiff.training.config.trainable import Full, LoRA, TextualInversion, Trainable

__all__ = [
    "IMAGE_KINDS",
    "MESHES",
    "PROCEDURAL_KINDS",
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
    "TimestepSampling",
    "TrainConfig",
    "Trainable",
    "VAEObjective",
    "data_fields",
    "resume_identity",
]


@config_section("")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A complete training: with the same code it gives the same weights."""

    objective: Objective
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimiser: OptimiserConfig = dataclasses.field(default_factory=OptimiserConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    steps: int  # optimiser steps in total
    batch_size: int  # images per step, over all devices
    # parts of a batch whose gradients are computed one after another, to save memory
    gradient_accumulation_steps: int = 1
    seed: int = 0  # of the initial weights and all noise
    dtype: str = "float32"  # compute dtype of the networks; weights are float32
    ema: EMAConfig = dataclasses.field(default_factory=EMAConfig)
    log_every: int = 50  # steps between lines of the log, which average over them
    checkpoint_every: int = 1000  # steps between checkpoints
    sample_every: int = 2000  # steps between sample grids; 0: never
    tensorboard: bool = True  # whether to log to TensorBoard too
    wandb: str | None = None  # Weights & Biases project to log to as well
    max_checkpoints: int = 2  # newest checkpoints that are kept
    # consecutive steps with a loss or gradient that is not finite after which training stops
    max_nonfinite_steps: int = 10

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "batch_size",
            "log_every",
            "checkpoint_every",
            "max_checkpoints",
            "max_nonfinite_steps",
            "gradient_accumulation_steps",
        )
        for name in counts:
            positive(name, getattr(self, name))
        in_range("seed", self.seed, 0, 2**31 - 1)
        if self.data.num_scenes is not None:
            raise InputError(
                f"data.num_scenes: got {self.data.num_scenes}, expected it left out: it is for "
                "cache-latents, trainings render new scenes without end"
            )
        non_negative("sample_every", self.sample_every)
        one_of("dtype", self.dtype, DTYPES)
        if self.batch_size % self.gradient_accumulation_steps:
            raise InputError(
                f"gradient_accumulation_steps: got {self.gradient_accumulation_steps}, "
                f"expected a divisor of batch_size, {self.batch_size}"
            )
        if self.gradient_accumulation_steps > 1 and isinstance(self.objective, CLIPObjective):
            raise InputError(
                f"gradient_accumulation_steps: got {self.gradient_accumulation_steps}, expected 1: "
                "CLIP contrasts each caption with the whole batch"
            )
        objective = self.objective
        if self.mesh.reshard_after_forward and not (
            isinstance(objective, DiffusionObjective)
            and isinstance(objective.trainable, Full)
            and objective.remat != "none"
        ):
            raise InputError(
                "mesh.reshard_after_forward: got true, expected a DiffusionObjective of all "
                "weights (trainable Full) with objective.remat blocks or products"
            )
        if self.batch_size % self.data.variations:
            raise InputError(
                f"batch_size: got {self.batch_size}, "
                f"expected a multiple of data.variations, {self.data.variations}"
            )


# The fields of each objective that determine its parameters and their meaning.
_IDENTITY: dict[type, tuple[str, ...]] = {
    VAEObjective: ("model", "freeze_encoder", "adversarial", "discriminator"),
    CLIPObjective: ("text", "vision", "projection_dim", "has_attribute_heads"),
    DiffusionObjective: ("model", "schedule", "prediction_type", "trainable", "enlargement"),
    DistillationObjective: ("guidance_embedding_dim",),
    ClassifierObjective: ("model", "schedule"),
}


def resume_identity(config: TrainConfig) -> dict[str, Any]:
    """What must not change when a training resumes: dotted field name -> JSON-like value.

    That is the model, the seed, the optimiser and the weights that it freezes. Learning rates, loss
    weights, intervals and the number of steps may change. The experiment adds the values that come
    from a pipeline.
    """
    objective = config.objective
    values: dict[str, Any] = {
        "objective": type(objective).__name__,
        "seed": config.seed,
        "optimiser.name": config.optimiser.name,
        "ema.power_stds": list(config.ema.power_stds),
        "optimiser.lr_multipliers with 0": [
            pattern for pattern, f in config.optimiser.lr_multipliers if f == 0
        ],
    }
    from_pipeline = PIPELINE_FIELDS if getattr(objective, "pipeline", None) else ()
    for name in (n for n in _IDENTITY[type(objective)] if n not in from_pipeline):
        value = getattr(objective, name)
        if name == "trainable":
            values["objective.trainable"] = type(value).__name__
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.asdict(value)
            values |= {f"objective.{name}.{key}": item for key, item in fields.items()}
        else:
            values[f"objective.{name}"] = value
    return values
