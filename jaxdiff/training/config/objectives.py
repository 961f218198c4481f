"""What is learnt, and from what: one config for each objective."""

import dataclasses
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, non_negative, one_of, positive
from jaxdiff.diffusion.losses import WEIGHTINGS
from jaxdiff.diffusion.predictions import PREDICTION_TYPES
from jaxdiff.diffusion.schedules import NoiseSchedule
from jaxdiff.models.classifier import LatentClassifierConfig
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.models.discriminator import PatchDiscriminatorConfig
from jaxdiff.models.unet_config import UNet2DConditionConfig
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.nn.remat import REMAT
from jaxdiff.training.config.data import DataConfig
from jaxdiff.training.config.trainable import Full, Tuning

TIMES = ("uniform", "logit_normal")
# The fields of a DiffusionObjective that a pipeline says.
OF_PIPELINE = ("model", "vae", "text_encoder", "weights", "schedule", "prediction_type")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEObjective:
    """Learn to encode pictures into few numbers and back (Kingma & Welling, 1312.6114)."""

    model: AutoencoderKLConfig = dataclasses.field(default_factory=AutoencoderKLConfig)
    weights: str | None = None  # folder of a VAE to begin with; None begins at random
    only_decoder: bool = False  # whether the encoder, and so the latents, stay those of `weights`
    l1_weight: float = 1.0  # of the mean absolute error of the pixels
    l2_weight: float = 1.0  # of the mean squared error of the pixels
    edge_weight: float = 1.0  # of the mean absolute error of the differences of neighbouring pixels
    kl_weight: float = 1e-4  # of the divergence from N(0, 1), in nats per latent element
    perceptual: str | None = None  # folder of a CLIP model, or with clip/, that compares pictures
    perceptual_weight: float = 1.0  # of the distance between what its layers say
    adversarial_weight: float = 0.0  # of what the discriminator says; 0 trains none
    adversarial_start: int = 0  # steps after which it begins to learn and to be listened to
    adversarial_adaptive: bool = True  # whether its weight is times lambda (2012.09841, eq. 7)
    discriminator: PatchDiscriminatorConfig = dataclasses.field(
        default_factory=PatchDiscriminatorConfig
    )

    def __post_init__(self) -> None:
        for name in ("l1_weight", "l2_weight", "edge_weight", "kl_weight", "adversarial_weight"):
            non_negative(f"objective.{name}", getattr(self, name))
        if self.l1_weight + self.l2_weight == 0:
            raise InputError("objective.l1_weight: got 0 beside l2_weight 0, expected one above 0")
        positive("objective.perceptual_weight", self.perceptual_weight)
        non_negative("objective.adversarial_start", self.adversarial_start)
        if self.only_decoder and self.weights is None:
            raise InputError("objective.weights: got none, expected a folder for only_decoder")
        if self.only_decoder and self.kl_weight:
            self._left_out("with only_decoder, where latents do not change", kl_weight=1e-4)
        if self.perceptual is None:
            self._left_out("without perceptual", perceptual_weight=1.0)
        if not self.adversarial:
            self._left_out(
                "with adversarial_weight 0",
                adversarial_start=0,
                adversarial_adaptive=True,
                discriminator=PatchDiscriminatorConfig(),
            )

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.adversarial_weight > 0

    def _left_out(self, where: str, **defaults: Any) -> None:
        """InputError unless the fields are as they are when nobody sets them."""
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise InputError(
                    f"objective.{name}: got {getattr(self, name)!r}, expected it left out {where}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPObjective:
    """Tell which caption belongs to which picture (CLIP, 2103.00020)."""

    text: CLIPTextConfig = dataclasses.field(default_factory=CLIPTextConfig)
    vision: CLIPVisionConfig = dataclasses.field(default_factory=CLIPVisionConfig)
    projection_dim: int = 128  # of the space in which pictures and captions meet
    logit_scale: float = 14.285714  # initial inverse temperature, 1 / 0.07
    # of the negative log-likelihood of a scene's attributes, which linear heads read from both
    # towers and from the text encoder's last positions; 0 leaves the heads out
    attribute_weight: float = 0.0

    def __post_init__(self) -> None:
        non_negative("objective.attribute_weight", self.attribute_weight)
        positive("objective.projection_dim", self.projection_dim)
        in_range("objective.logit_scale", self.logit_scale, 1, 100)

    @property
    def heads(self) -> bool:
        """Whether attributes are learnt as well."""
        return self.attribute_weight > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionObjective:
    """Learn to denoise the latents of captioned pictures (latent diffusion, 2112.10752).

    What `pipeline` brings along is left out beside it: the fields in OF_PIPELINE.
    """

    pipeline: str | None = None  # folder, file or Hub id of a whole model to begin with
    model: UNet2DConditionConfig = dataclasses.field(default_factory=UNet2DConditionConfig)
    vae: str | None = None  # folder of the frozen VAE: a finished training's export/
    text_encoder: str | None = None  # folder with the text_encoder/ and tokenizer/
    weights: str | None = None  # folder of a UNet to begin with; None begins at random
    schedule: NoiseSchedule = dataclasses.field(
        default_factory=lambda: NoiseSchedule(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )
    )
    prediction_type: str = "v_prediction"  # what the network outputs: a name in diffusion.KINDS
    train: Tuning = dataclasses.field(default_factory=Full)  # which weights are trained
    weighting: str = "uniform"  # of the squared error over noise levels: a name in WEIGHTINGS
    gamma: float = 5.0  # the cap of min_snr and soft_min_snr; the exponent of p2, there 0.5 or 1
    noise_offset: float = 0.0  # deviation of what is added to whole channels of the noise
    remat: str = "none"  # what is computed again for gradients, to save memory: a name in REMAT
    times: str = "uniform"  # how noise levels are drawn: uniform or logit_normal (2403.03206)
    time_shift: float = 1.0  # above 1 draws high noise more often (2403.03206, eq. 23)
    caption_dropout: float = 0.1  # share of captions replaced by the null caption
    # the same of what each of several text encoders reads, beside those and independently
    caption_dropout_each: tuple[float, ...] = ()
    # Pictures of what the trained thing is one of, half of each batch, so that the word for them
    # keeps its meaning (DreamBooth, 2208.12242, section 3.3).
    prior: DataConfig | None = None
    prior_weight: float = 1.0  # of their loss beside that of the others
    sample_scale: float = 5.0  # guidance scale of the sample grids
    sample_steps: int = 25  # DDIM steps of the sample grids
    # pictures drawn beside each grid to be measured; None: 64 where they can be, 0: none
    evaluated: int | None = None
    clip: str | None = None  # folder of the CLIP that measures; None: that beside the text encoder

    def __post_init__(self) -> None:
        if self.evaluated is not None and (self.evaluated < 0 or self.evaluated == 1):
            raise InputError(f"objective.evaluated: got {self.evaluated}, expected 0 or 2 or more")
        if self.evaluated == 0 and self.clip is not None:
            raise InputError(
                f"objective.clip: got {self.clip}, expected it left out with evaluated 0"
            )
        one_of("objective.prediction_type", self.prediction_type, PREDICTION_TYPES)
        one_of("objective.weighting", self.weighting, WEIGHTINGS)
        one_of("objective.times", self.times, TIMES)
        one_of("objective.remat", self.remat, REMAT)
        if self.schedule.zero_terminal_snr and self.prediction_type == "epsilon":
            raise InputError(
                "objective.prediction_type: got epsilon for a schedule that ends without signal, "
                "expected another kind: there it says nothing about the picture"
            )
        positive("objective.gamma", self.gamma)
        non_negative("objective.noise_offset", self.noise_offset)
        in_range("objective.time_shift", self.time_shift, 0.01, 100)
        for rate in (self.caption_dropout, *self.caption_dropout_each):
            in_range("objective.caption_dropout", rate, 0, 1)
        positive("objective.prior_weight", self.prior_weight)
        if self.prior is None and self.prior_weight != 1:
            raise InputError(
                f"objective.prior_weight: got {self.prior_weight} without objective.prior, "
                "expected both"
            )
        in_range("objective.sample_scale", self.sample_scale, 0, 1000)
        in_range("objective.sample_steps", self.sample_steps, 1, self.schedule.num_train_timesteps)
        self._check_parts()

    def _check_parts(self) -> None:
        """InputError unless every part is said once."""
        for field in dataclasses.fields(self):
            if self.pipeline is None and field.name in ("vae", "text_encoder"):
                if getattr(self, field.name) is None:
                    raise InputError(f"objective.{field.name}: got none, expected it or a pipeline")
            elif self.pipeline is not None and field.name in OF_PIPELINE:
                made = field.default_factory
                default = field.default if made is dataclasses.MISSING else made()
                if getattr(self, field.name) != default:
                    raise InputError(
                        f"objective.{field.name}: got one beside objective.pipeline, expected it "
                        "left out: the pipeline brings its own"
                    )
        if self.pipeline is not None or self.weights is not None:
            return
        if isinstance(self.train, Full) and self.train.from_scratch:
            raise InputError(
                "objective.train.from_scratch: got it without objective.pipeline, expected both, "
                "or neither: a UNet without weights begins at random"
            )
        if not isinstance(self.train, Full):
            raise InputError(
                f"objective.train: got {type(self.train).__name__} for a new UNet, expected "
                "objective.pipeline or objective.weights"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationObjective:
    """Teach a UNet guidance: the scale becomes an input (2210.03142, section 3.1)."""

    teacher: str  # pipeline folder whose UNet, guided, is learnt from and begun with
    scale_width: int = 64  # of the embedded scale that the network is told
    scales: tuple[float, float] = (1.0, 10.0)  # range of the scales taught, uniformly drawn
    remat: str = "none"  # what is computed again for gradients, to save memory: a name in REMAT
    times: str = "uniform"  # how noise levels are drawn: uniform or logit_normal (2403.03206)
    time_shift: float = 1.0  # above 1 draws high noise more often (2403.03206, eq. 23)
    sample_scale: float = 3.0  # guidance scale of the sample grids
    sample_steps: int = 25  # DDIM steps of the sample grids

    def __post_init__(self) -> None:
        positive("objective.scale_width", self.scale_width)
        one_of("objective.remat", self.remat, REMAT)
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
