"""FLUX.1: dev, Krea, schnell, Kontext, Fill, Canny and Depth, which predict the velocity of a flow.

CLIP gives the pooled embedding alone, T5 the hidden states, padding included; they may read
different texts. All but schnell are guidance-distilled: the network takes the guidance scale.
Kontext (2506.15742) edits an image, whose latents are further tokens; Fill repaints under a mask;
Canny and Depth follow the edges or the depths of a control image, whose latents are channels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, NDArray
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import required_component
from jaxdiff.families.extras import GUIDANCE_SCALE, Extra, ExtraInputs, Option
from jaxdiff.guidance.base import is_unguided
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.flux.adapter import FluxAdapter
from jaxdiff.models.flux.config import PATCH, FluxTokensConfig
from jaxdiff.models.flux.module import FluxTransformer2DModel
from jaxdiff.models.network_adapter import CHANNELS
from jaxdiff.models.text_encoder import TextModel
from jaxdiff.models.vae import AutoencoderKL

# They have the components of FLUX.1 dev: only the name tells.
KONTEXT = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")
PIPELINE_CLASSES = (
    *(f"Flux{task}Pipeline" for task in ("", "Img2Img", "Inpaint", "Fill")),
    *(f"FluxControl{task}Pipeline" for task in ("", "Img2Img", "Inpaint")),
    *KONTEXT,
)
CODECS = AutoencoderKL, AutoencoderTiny


@dataclasses.dataclass(frozen=True)
class DistilledGuidance(Extra):
    """The guidance scale, for a guidance-distilled network (2210.03142).

    Without a guidance rule it is that of the request. A rule, such as cfg, has that scale for
    itself, and the network takes `distilled_guidance_scale`, which is `scale` by default.
    """

    scale: float
    argument = "guidance"
    uses_guidance_scale = True
    options: ClassVar[Mapping[str, Option]] = {
        "distilled_guidance_scale": Option(float | None, None, 0, 100)  # None: the model's
    }
    defaults: ClassVar[Mapping[str, Any]] = {"guidance": "none"}

    def check(self, settings: Mapping[str, Any], texts: Sequence[str]) -> None:
        scale = settings.get("distilled_guidance_scale")
        if scale is not None and is_unguided(settings["guidance"]):
            raise InputError(
                f"distilled_guidance_scale: got {scale} with guidance {settings['guidance']}, "
                "expected it as the guidance_scale, or a guidance rule such as cfg"
            )

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k"]:
        scales = np.asarray(inputs.guidance_scales, np.float32)
        if not is_unguided(inputs.guidance):
            own = [each.get("distilled_guidance_scale", self.scale) for each in inputs.options]
            scales = np.array(own, np.float32)
        return inputs.for_streams(scales)

    def of_batch(self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]) -> Float[Array, "b"]:
        """The batch's GUIDANCE_SCALE (b,)."""
        return batch[GUIDANCE_SCALE]


@dataclasses.dataclass(frozen=True)
class ReferenceImage(Extra):
    """The latents of the image that is edited, at the size of the image that is generated."""

    argument = "reference"
    uses_image = True

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k h w c"] | None:
        """The latents; None without an image, from text alone."""
        latents = inputs.image_latents()
        return None if latents is None else inputs.for_streams(latents)

    def of_batch(self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]) -> None:
        """None: no data have pairs of images."""


@dataclasses.dataclass(frozen=True)
class ControlImage(Extra):
    """The latents of the control image, which has the edges or the depths of what is generated."""

    argument = CHANNELS
    uses_image = True
    untrainable = "got a transformer with a control image, expected one without"

    def check(self, settings: Mapping[str, Any], texts: Sequence[str]) -> None:
        start, strength = settings.get("denoising_start"), settings.get("strength")
        got = None
        if settings.get("mask") is not None:
            got = "a mask"
        elif start is not None:
            got = f"denoising_start {start}"
        elif strength not in (None, 1):
            got = f"strength {strength}"
        if got is not None:
            raise InputError(
                f"image: got {got} with a control image, expected it alone: no pixel of it is kept"
            )

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k h w c"]:
        latents = inputs.image_latents()
        if latents is None:
            raise InputError("image: got none, expected the control image, of edges or of depths")
        return inputs.for_streams(latents)

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        raise NotImplementedError(self.untrainable)


@dataclasses.dataclass(frozen=True)
class FillChannels(Extra):
    """The latents of the masked image, and the mask; without a mask everything is generated.

    The mask's pixels under a latent are its channels, row by row.
    """

    argument = CHANNELS
    uses_mask = True
    untrainable = "got a transformer for inpainting, expected one that is not"

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k h w c"]:
        count, (height, width) = len(inputs.guidance_scales), inputs.size
        mask, around = inputs.mask, np.zeros((count, height, width, 3), np.float32)
        if mask is None:
            mask = np.ones((count, height, width, 1), np.float32)
        elif inputs.image is None:
            raise InputError("image: got latents with a mask, expected an image")
        else:
            around = inputs.image * (1 - mask)
        latents = inputs.encode(around)
        h, w = latents.shape[1:3]
        pixels = mask.reshape(count, h, height // h, w, width // w).transpose(0, 1, 3, 2, 4)
        channels = np.concatenate([latents, pixels.reshape(count, h, w, -1)], axis=-1)
        return inputs.for_streams(channels)

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        raise NotImplementedError(self.untrainable)


CLIP = TextEncoder(layer=None, pooled=True, max_chunks=1)
T5 = TextEncoder(
    component="text_encoder_2",
    tokenizer="tokenizer_2",
    length=512,
    max_length=512,
    max_chunks=1,
    skips_layers=False,
)
FLUX = Family(
    name="FLUX.1",
    network="transformer",
    network_class=FluxTransformer2DModel,
    adapter=FluxAdapter,
    latent_multiple=PATCH,
    text_encoders=(CLIP, T5),
    pooled_argument="pooled_projections",
    extras=(DistilledGuidance(3.5),),
    defaults={"guidance_scale": 3.5, "steps": 28},
)
SCHNELL = dataclasses.replace(
    FLUX,
    name="FLUX.1 schnell",
    text_encoders=(CLIP, dataclasses.replace(T5, length=256)),
    extras=(),
    defaults={"guidance": "none", "guidance_scale": 1.0, "steps": 4},
)
FLUX_KONTEXT = dataclasses.replace(
    FLUX, name="FLUX.1 Kontext", extras=(DistilledGuidance(3.5), ReferenceImage())
)
FILL = dataclasses.replace(
    FLUX,
    name="FLUX.1 Fill",
    extras=(DistilledGuidance(30.0), FillChannels()),
    defaults={"guidance_scale": 30.0, "steps": 50},
)
CONTROL = dataclasses.replace(
    FLUX,
    name="FLUX.1 Canny or Depth",
    extras=(DistilledGuidance(10.0), ControlImage()),
    defaults={"guidance_scale": 10.0, "steps": 50},
)
FAMILIES = (FLUX, SCHNELL, FLUX_KONTEXT, FILL, CONTROL)


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together.

    `options` are the plain values of model_index.json.
    """
    transformer = required_component(components, FLUX.network, FluxTransformer2DModel, source)
    config = cast(FluxTransformer2DModel, transformer).config
    vae = cast(AutoencoderKL, required_component(components, "vae", CODECS, source))
    clip = cast(
        CLIPTextModel, required_component(components, CLIP.component, CLIPTextModel, source)
    )
    width = clip.config.hidden_size
    if clip.text_projection is not None:
        width = clip.config.projection_dim
    if width != config.pooled_projection_dim:
        raise InputError(
            f"{source}: {CLIP.component}: got a pooled embedding of width {width}, "
            f"expected {config.pooled_projection_dim}, as the transformer has"
        )
    check_states(components, T5.component, config, source)
    latents = PATCH**2 * vae.config.latent_channels
    more = _more_channels(config, latents, PATCH**2 * vae.config.downscale**2, source)
    if more:
        family = CONTROL if more == latents else FILL
    elif options.get("_class_name") in KONTEXT:
        family = FLUX_KONTEXT
    else:
        family = FLUX if config.guidance_embeds else SCHNELL
    if not config.guidance_embeds:
        extras = tuple(each for each in family.extras if not isinstance(each, DistilledGuidance))
        family = dataclasses.replace(family, extras=extras)
    return family


def check_states(
    components: Mapping[str, nnx.Module], name: str, config: FluxTokensConfig, source: str
) -> None:
    """InputError unless the text encoder `name` gives states that the transformer takes."""
    encoder = cast(TextModel, required_component(components, name, TextModel, source))
    if encoder.config.hidden_size != config.joint_attention_dim:
        raise InputError(
            f"{source}: {name}: got hidden states of width {encoder.config.hidden_size}, "
            f"expected {config.joint_attention_dim}, as the transformer has"
        )


def _more_channels(config: FluxTokensConfig, latents: int, mask: int, source: str) -> int:
    """How many channels come beside the noisy latents; InputError for others than are known.

    A token has so many of latents and of the mask.
    """
    more = config.in_channels - latents
    if config.token_channels != latents or more not in (0, latents, latents + mask):
        raise InputError(
            f"{source}: transformer: got {config.in_channels} channels in and "
            f"{config.token_channels} out, expected {latents} as the VAE has, {2 * latents} in for "
            f"a control image, or {2 * latents + mask} in for inpainting"
        )
    return more
