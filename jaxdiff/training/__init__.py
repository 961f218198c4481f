"""Training as a library: configs, objectives, the compiled step, and the loop around it.

    program = make_program(task, frozen, mesh, steps=1000)
    state = program.init(seed=0)
    state, metrics = program.step(state, frozen, batch, key)

`jaxdiff.train(config, workdir)` does all of it, with data, checkpoints, logs and export.
"""

from jaxdiff.parallel.mesh import make_mesh, shard_batch
from jaxdiff.training.config import (
    MESHES,
    ClassifierObjective,
    CLIPObjective,
    DataConfig,
    DiffusionObjective,
    DistillationObjective,
    EMAConfig,
    Full,
    LoRA,
    MeshConfig,
    OptimiserConfig,
    TextualInversion,
    TrainConfig,
    VAEObjective,
)
from jaxdiff.training.loop import (
    BatchIterator,
    Hooks,
    Intervals,
    NonFiniteError,
    Prefetch,
    StoppedError,
    training_loop,
)
from jaxdiff.training.objectives.classifier import classifier_task
from jaxdiff.training.objectives.clip import clip_task
from jaxdiff.training.objectives.diffusion import ParameterPartition, diffusion_task, train_denoiser
from jaxdiff.training.objectives.distillation import distillation_task
from jaxdiff.training.objectives.trainable import (
    train_denoiser_and_text_encoders,
    train_lora,
    train_textual_inversion,
)
from jaxdiff.training.objectives.vae import vae_task
from jaxdiff.training.optimiser import make_optimiser
from jaxdiff.training.program import TrainProgram, make_program
from jaxdiff.training.step import (
    TrainingTask,
    TrainState,
    make_step,
    per_sample_normal,
    per_sample_split,
    per_sample_uniform,
)

__all__ = [
    "MESHES",
    "BatchIterator",
    "CLIPObjective",
    "ClassifierObjective",
    "DataConfig",
    "DiffusionObjective",
    "DistillationObjective",
    "EMAConfig",
    "Full",
    "Hooks",
    "Intervals",
    "LoRA",
    "MeshConfig",
    "NonFiniteError",
    "OptimiserConfig",
    "ParameterPartition",
    "Prefetch",
    "StoppedError",
    "TextualInversion",
    "TrainConfig",
    "TrainProgram",
    "TrainState",
    "TrainingTask",
    "VAEObjective",
    "classifier_task",
    "clip_task",
    "diffusion_task",
    "distillation_task",
    "make_mesh",
    "make_optimiser",
    "make_program",
    "make_step",
    "per_sample_normal",
    "per_sample_split",
    "per_sample_uniform",
    "shard_batch",
    "train_denoiser",
    "train_denoiser_and_text_encoders",
    "train_lora",
    "train_textual_inversion",
    "training_loop",
    "vae_task",
]


def __dir__() -> list[str]:
    return __all__
