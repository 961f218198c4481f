"""What a training is: one frozen tree of choices, checked when it is made.

A file in `configs/` defines `config = TrainConfig(...)`; the command line overrides its fields.
"""

import dataclasses
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import DTYPES
from jaxdiff.core.validate import in_range, one_of, positive
from jaxdiff.diffusion.losses import WEIGHTINGS
from jaxdiff.diffusion.predictions import KINDS
from jaxdiff.diffusion.schedules import NoiseSchedule
from jaxdiff.models.classifier import LatentClassifierConfig
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.models.unet_config import UNet2DConditionConfig
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.nn.stages import REMAT

DECAYS = ("linear", "cosine")
VARIATIONS = (1, 2, 4, 8)
TIMES = ("uniform", "logit_normal")
PICTURES = ("folder", "tars", "records", "hub")  # kinds of data that are pictures as stored
_STORED = {"kind", "seed", "threads", "path", "max_broken", "held_out"}
_PREPARED = _STORED | {"resolution", "widest", "cell", "crop", "flip", "cache"}
# The fields that count for each kind of data.
DATA_FIELDS: dict[str, set[str]] = {
    "scenes": {"kind", "seed", "threads", "variations"},
    "folder": _PREPARED | {"caption_key"},
    "tars": _PREPARED,
    "records": _PREPARED,
    "hub": _PREPARED | {"split", "image_key", "caption_key"},
    "latents": _STORED,
}


def _not_negative(prefix: str, config: Any, *names: str) -> None:
    for name in names:
        in_range(f"{prefix}.{name}", getattr(config, name), 0, float("inf"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEObjective:
    """Learn to encode pictures into few numbers and back (Kingma & Welling, 1312.6114)."""

    model: AutoencoderKLConfig = dataclasses.field(default_factory=AutoencoderKLConfig)
    l1_weight: float = 1.0  # of the mean absolute error of the pixels
    l2_weight: float = 1.0  # of the mean squared error of the pixels
    edge_weight: float = 1.0  # of the mean absolute error of the differences of neighbouring pixels
    kl_weight: float = 1e-4  # of the divergence from N(0, 1), in nats per latent element

    def __post_init__(self) -> None:
        _not_negative("objective", self, "l1_weight", "l2_weight", "edge_weight", "kl_weight")
        if self.l1_weight + self.l2_weight == 0:
            raise InputError("objective.l1_weight: got 0 beside l2_weight 0, expected one above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPObjective:
    """Tell which caption belongs to which picture (CLIP, 2103.00020)."""

    text: CLIPTextConfig = dataclasses.field(default_factory=CLIPTextConfig)
    vision: CLIPVisionConfig = dataclasses.field(default_factory=CLIPVisionConfig)
    projection_dim: int = 128  # of the space in which pictures and captions meet
    logit_scale: float = 14.285714  # initial inverse temperature, 1 / 0.07

    def __post_init__(self) -> None:
        positive("objective.projection_dim", self.projection_dim)
        in_range("objective.logit_scale", self.logit_scale, 1, 100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionObjective:
    """Learn to denoise the latents of captioned pictures (latent diffusion, 2112.10752)."""

    model: UNet2DConditionConfig = dataclasses.field(default_factory=UNet2DConditionConfig)
    vae: str  # folder of the frozen VAE: a finished training's export/
    text_encoder: str  # folder with the frozen text_encoder/ and tokenizer/
    weights: str | None = None  # folder of a UNet to begin with; None begins at random
    schedule: NoiseSchedule = dataclasses.field(
        default_factory=lambda: NoiseSchedule(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )
    )
    prediction_type: str = "v_prediction"  # what the network outputs: a name in diffusion.KINDS
    weighting: str = "uniform"  # of the squared error over noise levels: a name in WEIGHTINGS
    gamma: float = 5.0  # the cap of min_snr and soft_min_snr; the exponent of p2, there 0.5 or 1
    noise_offset: float = 0.0  # deviation of what is added to whole channels of the noise
    remat: str = "none"  # what is computed again for gradients, to save memory: a name in REMAT
    times: str = "uniform"  # how noise levels are drawn: uniform or logit_normal (2403.03206)
    time_shift: float = 1.0  # above 1 draws high noise more often (2403.03206, eq. 23)
    caption_dropout: float = 0.1  # share of captions replaced by the null caption
    sample_scale: float = 5.0  # guidance scale of the sample grids
    sample_steps: int = 25  # DDIM steps of the sample grids

    def __post_init__(self) -> None:
        one_of("objective.prediction_type", self.prediction_type, KINDS)
        one_of("objective.weighting", self.weighting, WEIGHTINGS)
        one_of("objective.times", self.times, TIMES)
        one_of("objective.remat", self.remat, REMAT)
        if self.schedule.zero_terminal_snr and self.prediction_type == "epsilon":
            raise InputError(
                "objective.prediction_type: got epsilon for a schedule that ends without signal, "
                "expected another kind: there it says nothing about the picture"
            )
        positive("objective.gamma", self.gamma)
        _not_negative("objective", self, "noise_offset")
        in_range("objective.time_shift", self.time_shift, 0.01, 100)
        in_range("objective.caption_dropout", self.caption_dropout, 0, 1)
        in_range("objective.sample_scale", self.sample_scale, 0, 1000)
        in_range("objective.sample_steps", self.sample_steps, 1, self.schedule.num_train_timesteps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationObjective:
    """Teach a UNet guidance: the scale becomes an input (2210.03142, section 3.1)."""

    teacher: str  # pipeline folder whose UNet, guided, is learnt from and begun with
    scale_width: int = 64  # of the embedded scale that the network is told
    scales: tuple[float, float] = (1.0, 10.0)  # range of the scales taught, uniformly drawn
    times: str = "uniform"  # how noise levels are drawn: uniform or logit_normal (2403.03206)
    time_shift: float = 1.0  # above 1 draws high noise more often (2403.03206, eq. 23)
    sample_scale: float = 3.0  # guidance scale of the sample grids
    sample_steps: int = 25  # DDIM steps of the sample grids

    def __post_init__(self) -> None:
        positive("objective.scale_width", self.scale_width)
        low, high = self.scales
        in_range("objective.scales", low, 0, 1000)
        in_range("objective.scales", high, low, 1000)
        one_of("objective.times", self.times, TIMES)
        in_range("objective.time_shift", self.time_shift, 0.01, 100)
        in_range("objective.sample_scale", self.sample_scale, 0, 1000)
        positive("objective.sample_steps", self.sample_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierObjective:
    """Learn to tell what noisy latents show, for classifier guidance (2105.05233, section 4)."""

    model: LatentClassifierConfig = dataclasses.field(default_factory=LatentClassifierConfig)
    vae: str  # folder of the frozen VAE
    # that of the diffusion model to be guided
    schedule: NoiseSchedule = dataclasses.field(
        default_factory=lambda: NoiseSchedule(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )
    )
    times: str = "uniform"  # how noise levels are drawn: uniform or logit_normal (2403.03206)
    time_shift: float = 1.0  # above 1 draws high noise more often (2403.03206, eq. 23)
    draws: int = 1  # noise levels for each picture: encoding it is the dearer part

    def __post_init__(self) -> None:
        one_of("objective.times", self.times, TIMES)
        in_range("objective.time_shift", self.time_shift, 0.01, 100)
        positive("objective.draws", self.draws)


Objective = (
    VAEObjective | CLIPObjective | DiffusionObjective | DistillationObjective | ClassifierObjective
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures are seen: procedural scenes, captioned pictures that are stored, or latents.

    A kind in PICTURES reads pictures, `latents` what `jaxdiff cache-latents` has made of them.
    """

    kind: str = "scenes"  # scenes, folder, tars, records, hub or latents
    path: str | None = None  # folder or URL of what is stored; for hub a dataset's name
    seed: int = 0  # of the scenes, of crops and flips, and of their order
    variations: int = 1  # how many of a batch's consecutive scenes differ in one thing only
    resolution: int | None = None  # side in pixels of the squares that pictures are brought to
    widest: float = 1.0  # largest ratio of sides, for buckets of other shapes than the square
    cell: int = 64  # sides of the buckets are multiples of it
    crop: str = "centre"  # what is cut out of a resized picture: centre or random
    flip: bool = False  # whether half of the pictures are mirrored
    split: str = "train"  # of a dataset from the Hub
    image_key: str = "image"  # its column of pictures
    caption_key: str = "text"  # its column of captions; in metadata.jsonl the key of captions
    max_broken: float = 0.05  # share of unusable items above which training ends
    held_out: int = 64  # items that are validated and not trained on; at most a tenth
    threads: int = 1  # that prepare batches
    cache: str | None = None  # folder for indices of tars and sizes; None: the user's cache folder

    def __post_init__(self) -> None:
        one_of("data.kind", self.kind, DATA_FIELDS)
        in_range("data.seed", self.seed, 0, 2**31 - 1)
        one_of("data.variations", self.variations, VARIATIONS)  # divisors of a validation batch
        in_range("data.widest", self.widest, 1, 16)
        positive("data.cell", self.cell)
        one_of("data.crop", self.crop, ("centre", "random"))
        in_range("data.max_broken", self.max_broken, 0, 1)
        in_range("data.held_out", self.held_out, 1, 1 << 20)
        in_range("data.threads", self.threads, 0, 64)
        for field in dataclasses.fields(self):
            value, used = getattr(self, field.name), DATA_FIELDS[self.kind]
            if value != field.default and field.name not in used:
                raise InputError(
                    f"data.{field.name}: got {value!r}, expected it left out for data.kind "
                    f"{self.kind}"
                )
        if self.kind != "scenes" and self.path is None:
            raise InputError(f"data.path: got none, expected one for data.kind {self.kind}")
        if self.kind in PICTURES:
            side = positive("data.resolution", self.resolution or 0)
            if side % self.cell:
                raise InputError(
                    f"data.resolution: got {side}, expected a multiple of data.cell, {self.cell}"
                )


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
        _not_negative("optimiser", self, "weight_decay", "warmup_steps")
        one_of("optimiser.decay", self.decay, DECAYS)
        in_range("optimiser.decay_fraction", self.decay_fraction, 0, 1)
        in_range("optimiser.final_fraction", self.final_fraction, 0, 1)
        positive("optimiser.clip_norm", self.clip_norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share the work: their number is data x fsdp x tensor."""

    data: int = -1  # groups of devices that each hold all weights; -1 takes what the others leave
    fsdp: int = 1  # devices that share the weights, each with a part of the batch of its own
    tensor: int = 1  # devices that share the weights and the work on the same part of the batch

    def __post_init__(self) -> None:
        wanted = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in wanted.items():
            if size != -1:
                positive(f"mesh.{name}", size)
        if list(wanted.values()).count(-1) > 1:
            raise InputError(f"mesh: got {wanted}, expected at most one -1")


MESHES = {
    "replicate": MeshConfig(),
    "fsdp": MeshConfig(data=1, fsdp=-1),
    "fsdp+tensor": MeshConfig(data=1, fsdp=-1, tensor=4),
}


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
    ema_decay: float = 0.999  # of the averaged weights that are sampled from and exported
    log_every: int = 50  # steps between lines of the log, which are means over those steps
    checkpoint_every: int = 1000  # steps between checkpoints
    sample_every: int = 2000  # steps between sample grids; 0 makes none
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
        in_range("ema_decay", self.ema_decay, 0, 1)
        _not_negative("train", self, "sample_every")
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
    VAEObjective: ("model",),
    CLIPObjective: ("text", "vision", "projection_dim"),
    DiffusionObjective: ("model", "schedule", "prediction_type"),
    DistillationObjective: ("scale_width",),
    ClassifierObjective: ("model", "schedule"),
}


def identity(config: TrainConfig) -> dict[str, Any]:
    """What must not change when a training goes on: dotted field name -> value, JSON-like.

    That is the model and the seed. Learning rates, loss weights, intervals and the number of steps
    may change.
    """
    objective = config.objective
    values: dict[str, Any] = {"objective": type(objective).__name__, "seed": config.seed}
    for name in _IDENTITY[type(objective)]:
        value = getattr(objective, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.asdict(value)
            values |= {f"objective.{name}.{key}": item for key, item in fields.items()}
        else:
            values[f"objective.{name}"] = value
    return values
