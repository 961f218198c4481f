"""The config of each objective."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxdiff.core.configs import Need
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, non_negative, one_of, positive
from jaxdiff.diffusion.denoising import PREDICTION_TYPES
from jaxdiff.diffusion.losses import WEIGHTINGS
from jaxdiff.diffusion.schedules import FlowSchedule, VPSchedule
from jaxdiff.models.classifier import LatentClassifierConfig
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.models.discriminator import PatchDiscriminatorConfig
from jaxdiff.models.dit.config import DiTTransformer2DConfig
from jaxdiff.models.pixart.config import PixArtTransformer2DConfig
from jaxdiff.models.prior.config import PriorTransformerConfig
from jaxdiff.models.unet.class_conditional import ClassConditionalUNet2DConfig
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.nn.remat import REMAT
from jaxdiff.training.config.aliases import config_section
from jaxdiff.training.config.data import DataConfig
from jaxdiff.training.config.trainable import Full, Trainable

TIMESTEP_SAMPLINGS = ("uniform", "logit_normal", "mode")
MAX_SAMPLE_STEPS = 1000  # of a flow
VLB_WEIGHT = 0.001  # of Improved DDPM (2102.09672, section 3.1)
# The fields of a DiffusionObjective that a pipeline provides.
PIPELINE_FIELDS = (
    "model",
    "vae",
    "text_encoder",
    "class_names",
    "weights",
    "schedule",
    "prediction_type",
)
# Configs of networks that denoise.
DenoiserConfig = (
    ClassConditionalUNet2DConfig  # before the class that it extends, which would take its place
    | UNet2DConditionConfig
    | DiTTransformer2DConfig
    | PixArtTransformer2DConfig
    | PriorTransformerConfig
)


def reads_labels(model: Any) -> bool:
    """Whether the network of this config reads class labels, and no text."""
    return isinstance(model, DiTTransformer2DConfig | ClassConditionalUNet2DConfig)


# By addition_embed_type of a UNet that reads embeddings of images, with texts or without.
_EMBEDDED = {
    "image": ("vae", "image_encoder"),
    "image_hint": ("vae", "image_encoder"),
    "text_image": ("vae", "text_encoder", "image_encoder"),
}


def components_of(model: Any) -> tuple[str, ...]:
    """The fields of a DiffusionObjective with the other networks that one of this config needs."""
    if isinstance(model, PriorTransformerConfig):
        return "text_encoder", "image_encoder"
    if isinstance(model, UNet2DConditionConfig) and model.addition_embed_type in _EMBEDDED:
        return _EMBEDDED[model.addition_embed_type]
    return ("vae",) if reads_labels(model) else ("vae", "text_encoder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimestepSampling:
    """How the times of a training are sampled: fields of each objective with noise levels.

    The share u of the way to noise is sampled as SD3 does it (2403.03206, section 3.1): `uniform`;
    `logit_normal`, the sigmoid of N(logit_mean, logit_std^2) (eq. 19); or `mode`, which for
    mode_scale > 0 prefers the middle and for mode_scale < 0 the ends (eq. 20).
    """

    needs: ClassVar[Mapping[str, Need]] = {
        "logit_mean": Need("timestep_sampling", ("logit_normal",)),
        "logit_std": Need("timestep_sampling", ("logit_normal",)),
        "mode_scale": Need("timestep_sampling", ("mode",)),
    }

    timestep_sampling: str = "uniform"  # uniform, logit_normal or mode (2403.03206, section 3.1)
    logit_mean: float = 0.0  # of logit_normal: above 0 more noise
    logit_std: float = 1.0  # of logit_normal: the smaller, the more of the middle
    mode_scale: float = 1.29  # of mode, -1 to 2 / (pi - 2); 0: uniform
    timestep_shift: float = 1.0  # above 1: more noise (2403.03206, eq. 23)

    def __post_init__(self) -> None:
        one_of("objective.timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        in_range("objective.logit_mean", self.logit_mean, -10, 10)
        in_range("objective.logit_std", self.logit_std, 1e-3, 10)
        # beyond, times would go backwards where u goes on
        in_range("objective.mode_scale", self.mode_scale, -1, 2 / (math.pi - 2))
        in_range("objective.timestep_shift", self.timestep_shift, 0.01, 100)


@config_section("objective")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEObjective:
    """Train a VAE (Kingma & Welling, 1312.6114), as latent diffusion does (2112.10752)."""

    needs: ClassVar[Mapping[str, Need]] = {
        "freeze_encoder": Need("weights"),
        "latent_noise": Need("freeze_encoder"),
        "perceptual_weight": Need("perceptual_model"),
        "adversarial_start": Need("adversarial_weight"),
        "adversarial_adaptive": Need("adversarial_weight"),
        "discriminator": Need("adversarial_weight"),
    }

    model: AutoencoderKLConfig = dataclasses.field(default_factory=AutoencoderKLConfig)
    weights: str | None = None  # folder of a VAE to start from; None: random weights
    freeze_encoder: bool = False  # whether to train only the decoder, so that latents stay the same
    # largest standard deviation of the noise that the decoder learns to remove from scaled latents;
    # each image's is uniform from 0. With freeze_encoder alone
    latent_noise: float = 0.0
    l1_weight: float = 1.0  # of the mean absolute error of pixels
    l2_weight: float = 1.0  # of the mean squared error of pixels
    edge_weight: float = 1.0  # of the mean absolute error of differences of neighbouring pixels
    kl_weight: float = 1e-4  # of the KL divergence from N(0, 1), in nats per latent element
    # folder of the CLIP model of the perceptual loss, or one with clip/; None: no such loss
    perceptual_model: str | None = None
    perceptual_weight: float = 1.0  # of the distance between its hidden states
    adversarial_weight: float = 0.0  # of the decoder's adversarial loss; 0: no discriminator
    adversarial_start: int = 0  # steps before the discriminator trains and counts
    adversarial_adaptive: bool = (
        True  # whether to multiply the weight by lambda (2012.09841, eq. 7)
    )
    discriminator: PatchDiscriminatorConfig = dataclasses.field(
        default_factory=PatchDiscriminatorConfig
    )

    def __post_init__(self) -> None:
        weights = ("l1_weight", "l2_weight", "edge_weight", "kl_weight", "adversarial_weight")
        for name in (*weights, "latent_noise"):
            non_negative(f"objective.{name}", getattr(self, name))
        if self.l1_weight + self.l2_weight == 0:
            raise InputError("objective.l1_weight: got 0 beside l2_weight 0, expected one above 0")
        positive("objective.perceptual_weight", self.perceptual_weight)
        non_negative("objective.adversarial_start", self.adversarial_start)
        if self.freeze_encoder and self.kl_weight not in (0, 1e-4):
            raise InputError(
                f"objective.kl_weight: got {self.kl_weight}, expected it left out with "
                "objective.freeze_encoder, where latents do not change"
            )

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.adversarial_weight > 0


@config_section("objective")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPObjective:
    """Train a CLIP model with the contrastive loss (2103.00020)."""

    text: CLIPTextConfig = dataclasses.field(default_factory=CLIPTextConfig)
    vision: CLIPVisionConfig = dataclasses.field(default_factory=CLIPVisionConfig)
    projection_dim: int = 128  # of the shared embedding space
    logit_scale: float = 14.285714  # initial inverse temperature, 1 / 0.07
    # of the negative log-likelihood of a scene's attributes, which linear heads predict from both
    # towers and from the text encoder's last positions; 0: no heads
    attribute_weight: float = 0.0

    def __post_init__(self) -> None:
        non_negative("objective.attribute_weight", self.attribute_weight)
        positive("objective.projection_dim", self.projection_dim)
        in_range("objective.logit_scale", self.logit_scale, 1, 100)

    @property
    def has_attribute_heads(self) -> bool:
        """Whether attribute heads are trained as well."""
        return self.attribute_weight > 0


PIXELS = "pixels"  # in place of a VAE
ENLARGEMENT = 4


@config_section("objective")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionObjective(TimestepSampling):
    """Train a latent diffusion model (2112.10752).

    A `pipeline` provides the fields in PIPELINE_FIELDS, which are then left out.
    """

    needs: ClassVar[Mapping[str, Need]] = {
        **TimestepSampling.needs,
        "snr_gamma": Need("weighting", ("min_snr", "soft_min_snr", "p2")),
        "prior_loss_weight": Need("prior_data"),
    }

    pipeline: str | None = None  # folder, file or Hub id of the model to start from
    # of the network; its class decides which one it is
    model: DenoiserConfig = dataclasses.field(default_factory=UNet2DConditionConfig)
    # folder of the frozen VAE: export/ of its training; "pixels": the network denoises pixels;
    # None for priors
    vae: str | None = None
    # folder with the text_encoder/ and tokenizer/; None for networks that read no text
    text_encoder: str | None = None
    # folder of the CLIP model, or one with image_encoder/ or clip/, of networks that generate or
    # read embeddings of images; a pipeline may have its own
    image_encoder: str | None = None
    class_names: tuple[str, ...] = ()  # of each class label; without, captions are numbers
    weights: str | None = None  # folder of a network to start from; None: random weights
    schedule: VPSchedule | FlowSchedule = dataclasses.field(
        default_factory=lambda: VPSchedule(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )
    )
    prediction_type: str = "v_prediction"  # output of the network: one of PREDICTION_TYPES
    trainable: Trainable = dataclasses.field(default_factory=Full)  # which weights are trained
    weighting: str = "uniform"  # loss weighting over timesteps: one of WEIGHTINGS
    snr_gamma: float = 5.0  # of min_snr and soft_min_snr: the cap; of p2: the exponent, 0.5 or 1
    # lambda of the variational bound (2102.09672, eq. 16), in bits per element of an image, which
    # trains the variance that a network learns; 0: it is not trained
    vlb_weight: float = VLB_WEIGHT
    noise_offset: float = 0.0  # standard deviation of an offset added to each channel of the noise
    remat: str = "none"  # what the backward pass recomputes, to save memory: one of REMAT
    # whether the shift of a flow is that of the number of 2x2 patches of the latents, as in Flux
    timestep_shift_by_resolution: bool = False
    caption_dropout: float = 0.1  # fraction of captions replaced by the null caption
    # the same for each of several text encoders separately, in addition
    caption_dropout_per_encoder: tuple[float, ...] = ()
    # that guidance-distilled networks take while they are trained, such as FLUX.1 dev (2210.03142);
    # 1: that of images which no guidance has made
    distilled_guidance_scale: float = 1.0
    # how many times wider images are than those that a network of pixels enlarges to them
    enlargement: int = ENLARGEMENT
    # Class images for prior preservation, half of each batch (DreamBooth, 2208.12242, section 3.3).
    prior_data: DataConfig | None = None
    prior_loss_weight: float = 1.0  # of their loss relative to that of the others
    sample_guidance_scale: float = 5.0  # guidance scale of the sample grids
    sample_steps: int = 25  # DDIM steps of the sample grids
    # images generated with each grid for evaluation; None: 64 where there is a metric, 0: none
    num_eval_images: int | None = None
    # folder of the CLIP model of validation_fid; None: clip/ next to the text encoder
    eval_clip: str | None = None

    def __post_init__(self) -> None:
        if self.num_eval_images is not None and (
            self.num_eval_images < 0 or self.num_eval_images == 1
        ):
            raise InputError(
                f"objective.num_eval_images: got {self.num_eval_images}, expected 0 or 2 or more"
            )
        if self.num_eval_images == 0 and self.eval_clip is not None:
            raise InputError(
                f"objective.eval_clip: got {self.eval_clip}, expected it left out with "
                "num_eval_images 0"
            )
        one_of("objective.prediction_type", self.prediction_type, PREDICTION_TYPES)
        one_of("objective.weighting", self.weighting, WEIGHTINGS)
        super().__post_init__()
        one_of("objective.remat", self.remat, REMAT)
        schedule = self.schedule
        flow = isinstance(schedule, FlowSchedule)
        no_signal = flow or schedule.zero_terminal_snr
        if no_signal and self.prediction_type in ("epsilon", "score"):
            raise InputError(
                f"objective.prediction_type: got {self.prediction_type} for a schedule that ends "
                f"without signal, expected another type: at pure noise, {self.prediction_type} "
                "contains no information about the image"
            )
        if flow and schedule.path != "linear":
            raise InputError(
                f"objective.schedule.path: got {schedule.path}, expected linear: pipeline folders "
                "cannot describe others; VPSchedule(beta_schedule=cosine) is near to cosine"
            )
        if self.timestep_shift_by_resolution and not flow and self.pipeline is None:
            raise InputError(
                "objective.timestep_shift_by_resolution: got true with a VPSchedule, expected a "
                "FlowSchedule"
            )
        positive("objective.snr_gamma", self.snr_gamma)
        non_negative("objective.vlb_weight", self.vlb_weight)
        non_negative("objective.noise_offset", self.noise_offset)
        for rate in (self.caption_dropout, *self.caption_dropout_per_encoder):
            in_range("objective.caption_dropout", rate, 0, 1)
        in_range("objective.distilled_guidance_scale", self.distilled_guidance_scale, 0, 100)
        positive("objective.prior_loss_weight", self.prior_loss_weight)
        in_range("objective.enlargement", self.enlargement, 2, 64)
        in_range("objective.sample_guidance_scale", self.sample_guidance_scale, 0, 1000)
        in_range(
            "objective.sample_steps",
            self.sample_steps,
            1,
            self.schedule.num_discrete or MAX_SAMPLE_STEPS,
        )
        self._check_components()

    def _check_components(self) -> None:
        """InputError unless every component is given once."""
        needed = components_of(self.model)
        if self.pipeline is None and self.class_names and not reads_labels(self.model):
            raise InputError(
                "objective.class_names: got some, expected them left out: the network reads no "
                "class labels"
            )
        for field in dataclasses.fields(self):
            if self.pipeline is None and field.name in ("vae", "text_encoder", "image_encoder"):
                given = getattr(self, field.name)
                if field.name in needed and given is None:
                    raise InputError(f"objective.{field.name}: got none, expected it or a pipeline")
                if field.name not in needed and given is not None:
                    raise InputError(
                        f"objective.{field.name}: got {given}, expected it left out: the network "
                        f"needs {' and '.join(needed)} alone"
                    )
            elif self.pipeline is not None and field.name in PIPELINE_FIELDS:
                made = field.default_factory
                default = field.default if made is dataclasses.MISSING else made()
                if getattr(self, field.name) != default:
                    raise InputError(
                        f"objective.{field.name}: got one besides objective.pipeline, expected it "
                        "left out: the pipeline provides it"
                    )
        if self.pipeline is not None or self.weights is not None:
            return
        if isinstance(self.trainable, Full) and self.trainable.from_scratch:
            raise InputError(
                "objective.trainable.from_scratch: got it without objective.pipeline, expected "
                "both, or neither: a network without weights is initialised at random"
            )
        if not isinstance(self.trainable, Full):
            raise InputError(
                f"objective.trainable: got {type(self.trainable).__name__} for a new network, "
                "expected objective.pipeline or objective.weights"
            )


@config_section("objective")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationObjective(TimestepSampling):
    """Distil guidance: the scale becomes an input of the UNet (2210.03142, section 3.1)."""

    teacher: str  # folder of the pipeline to distil; the student starts from its UNet
    guidance_embedding_dim: int = 64  # width of the embedding of the scale
    guidance_scale_range: tuple[float, float] = (
        1.0,
        10.0,
    )  # sampled uniformly
    remat: str = "none"  # what the backward pass recomputes, to save memory: one of REMAT
    sample_guidance_scale: float = 3.0  # guidance scale of the sample grids
    sample_steps: int = 25  # DDIM steps of the sample grids

    def __post_init__(self) -> None:
        positive("objective.guidance_embedding_dim", self.guidance_embedding_dim)
        one_of("objective.remat", self.remat, REMAT)
        low, high = self.guidance_scale_range
        in_range("objective.guidance_scale_range", low, 0, 1000)
        in_range("objective.guidance_scale_range", high, low, 1000)
        super().__post_init__()
        in_range("objective.sample_guidance_scale", self.sample_guidance_scale, 0, 1000)
        positive("objective.sample_steps", self.sample_steps)


@config_section("objective")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierObjective(TimestepSampling):
    """Train a classifier of noisy latents for classifier guidance (2105.05233, section 4)."""

    model: LatentClassifierConfig = dataclasses.field(default_factory=LatentClassifierConfig)
    vae: str  # folder of the frozen VAE
    # of the diffusion model to guide
    schedule: VPSchedule = dataclasses.field(
        default_factory=lambda: VPSchedule(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )
    )
    noise_levels_per_image: int = 1  # each image is encoded once for several noise levels

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("objective.noise_levels_per_image", self.noise_levels_per_image)


Objective = (
    VAEObjective | CLIPObjective | DiffusionObjective | DistillationObjective | ClassifierObjective
)
