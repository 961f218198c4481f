"""Stable Diffusion 1, 2 and XL: a UNet on the latents of a VAE, with CLIP's text encoders.

Versions 1 and 2 take the normed last hidden states of one encoder. XL takes the penultimate hidden
states of two encoders side by side, which may read different texts, the pooled embedding of the
second and six time ids (2307.01952, section 2.2). Its refiner has the second encoder only, and
takes five time ids, with an aesthetic score instead of the target size.
"""

import dataclasses
import pathlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.checkpoints.components import CONFIG
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.single_file_layouts import ANOTHER_VAE
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, NDArray
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import has_mask_channels, required_component
from jaxdiff.families.extras import GUIDANCE_SCALE, Extra, ExtraInputs, Option
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.nn.embeddings import guidance_embedding

MAX_SIZE = 16384  # pixels
_PAIR = tuple[int, int] | None
_OPTIONAL = Option(_PAIR, None, 0, MAX_SIZE)  # None: the image's
PIPELINE_CLASSES = (
    *(
        f"StableDiffusion{version}{task}Pipeline"
        for version in ("", "XL")
        for task in ("", "Img2Img", "Inpaint")
    ),
    "LatentConsistencyModelPipeline",
)


TimeIds = Sequence[Sequence[float]]


class _TimeIds(Extra):
    """Time ids: a row for streams with the prompt, and one for null streams."""

    argument = "time_ids"
    num_time_ids: ClassVar[int]

    @abstractmethod
    def own_and_null(
        self, options: Mapping[str, Any], size: tuple[int, int]
    ) -> tuple[TimeIds, TimeIds]:
        """Both for an image of `size` with these options."""

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k i"]:
        """The time ids of each stream."""
        pairs = [self.own_and_null(options, inputs.size) for options in inputs.options]
        rows = [[np.concatenate(p[not own]) for own in inputs.prompted] for p in pairs]
        return np.array(rows, np.float32)


@dataclasses.dataclass(frozen=True)
class SizesAndCrop(_TimeIds):
    """Original size, crop and target size, height before width.

    A null stream with a size of its own gets no crop unless the request has one.
    """

    num_time_ids = 6
    options: ClassVar[Mapping[str, Option]] = {
        "original_size": _OPTIONAL,
        "crop_top_left": Option(tuple[int, int] | None, (0, 0), 0, MAX_SIZE),
        "target_size": _OPTIONAL,
        "negative_original_size": _OPTIONAL,  # of the null stream; None: the same
        "negative_crop_top_left": _OPTIONAL,  # None: (0, 0) if other options are set
        "negative_target_size": _OPTIONAL,
    }

    def own_and_null(
        self, options: Mapping[str, Any], size: tuple[int, int]
    ) -> tuple[TimeIds, TimeIds]:
        get = options.get
        original, target = get("original_size", size), get("target_size", size)
        crop = get("crop_top_left", (0, 0))
        apart = "negative_original_size" in options or "negative_target_size" in options
        null = (
            get("negative_original_size", original),
            get("negative_crop_top_left", (0, 0) if apart else crop),
            get("negative_target_size", target),
        )
        return (original, crop, target), null

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b 6"]:
        """As the data have it, or that images are not cropped."""
        if "time_ids" in batch:
            return batch["time_ids"].astype(jnp.float32)
        b, h, w, _ = batch["image"].shape
        return jnp.tile(jnp.array([[h, w, 0, 0, h, w]], jnp.float32), (b, 1))


@dataclasses.dataclass(frozen=True)
class AestheticScore(_TimeIds):
    """Original size, crop and an aesthetic score, 0 to 10."""

    num_time_ids = 5
    options: ClassVar[Mapping[str, Option]] = {
        **{name: o for name, o in SizesAndCrop.options.items() if "target" not in name},
        "aesthetic_score": Option(float | None, 6.0, 0, 10),
        "negative_aesthetic_score": Option(float | None, 2.5, 0, 10),  # of the null stream
    }
    untrainable = (
        "got a UNet with 5 time ids, expected 6: no data have a refiner's aesthetic scores"
    )

    def own_and_null(
        self, options: Mapping[str, Any], size: tuple[int, int]
    ) -> tuple[TimeIds, TimeIds]:
        get = options.get
        original, crop = get("original_size", size), get("crop_top_left", (0, 0))
        own = original, crop, (get("aesthetic_score", 6.0),)
        null = (
            get("negative_original_size", original),
            get("negative_crop_top_left", (0, 0)),
            (get("negative_aesthetic_score", 2.5),),
        )
        return own, null

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b 5"]:
        raise NotImplementedError(self.untrainable)


@dataclasses.dataclass(frozen=True)
class GuidanceEmbedding(Extra):
    """The guidance scale, for a guidance-distilled network (2210.03142)."""

    width: int
    argument = "timestep_cond"
    uses_guidance_scale = True
    defaults: ClassVar[Mapping[str, Any]] = {"guidance": "none"}
    untrainable = "got a guidance-distilled UNet, expected one that is not"

    def check(self, settings: Mapping[str, Any], texts: Sequence[str]) -> None:
        if settings["guidance"] != "none":
            raise InputError(
                f"guidance: got {settings['guidance']}, expected none, because this model is "
                "guidance-distilled"
            )

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k s"]:
        scales = jnp.asarray(inputs.guidance_scales)
        return inputs.for_streams(np.asarray(guidance_embedding(scales, self.width)))

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b s"]:
        """The embedding of a batch's GUIDANCE_SCALE (b,)."""
        return guidance_embedding(batch[GUIDANCE_SCALE], self.width)


@dataclasses.dataclass(frozen=True)
class InpaintingChannels(Extra):
    """The mask and the latents of the masked image; without a mask everything is generated."""

    argument = "channels"
    uses_mask = True
    untrainable = "got a UNet for inpainting, expected one that is not"

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k h w c"]:
        count = len(inputs.guidance_scales)
        mask, around = inputs.mask, np.zeros((count, *inputs.size, 3), np.float32)
        if mask is None:
            mask = np.ones((count, *inputs.size, 1), np.float32)
        elif inputs.image is None:
            raise InputError("image: got latents with a mask, expected an image")
        else:
            around = inputs.image * (1 - mask)
        channels = np.concatenate([inputs.downsample(mask), inputs.encode(around)], axis=-1)
        return inputs.for_streams(channels)

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        raise NotImplementedError(self.untrainable)


SD = Family(
    name="Stable Diffusion 1 or 2",
    network="unet",
    network_class=UNet2DConditionModel,
    adapter=UNetAdapter,
)
SDXL = Family(
    name="Stable Diffusion XL",
    network="unet",
    network_class=UNet2DConditionModel,
    adapter=UNetAdapter,
    text_encoders=(
        TextEncoder(layer="penultimate"),
        TextEncoder(
            component="text_encoder_2", tokenizer="tokenizer_2", layer="penultimate", pooled=True
        ),
    ),
    zero_uncond=True,
    extras=(SizesAndCrop(),),
)
SDXL_REFINER = dataclasses.replace(
    SDXL,
    name="Stable Diffusion XL refiner",
    text_encoders=SDXL.text_encoders[1:],
    extras=(AestheticScore(),),
)
FAMILIES = (SD, SDXL, SDXL_REFINER)
FROM_SCRATCH = {"StableDiffusionPipeline": SD}


# The values that a UNet of these families has; others are of other families' conditioning.
CONDITIONING = {
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "context_projection": (None,),
}


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together.

    `options` are the plain values of model_index.json.
    """
    unet = cast(
        UNet2DConditionModel, required_component(components, "unet", UNet2DConditionModel, source)
    )
    if components.get("vae") is None:
        raise InputError(f"{source}: got a model without a VAE, expected one, or {ANOTHER_VAE}")
    codecs = AutoencoderKL, AutoencoderTiny
    vae = cast(AutoencoderKL, required_component(components, "vae", codecs, source))
    names = [each.component for each in SDXL.text_encoders if each.component in components]
    encoders = [
        cast(CLIPTextModel, required_component(components, name, CLIPTextModel, source))
        for name in names or [SD.text_encoders[0].component]
    ]
    family = _text_family(unet.config, encoders)
    zeros = family.zero_uncond and bool(options.get("force_zeros_for_empty_prompt", True))
    family = dataclasses.replace(family, zero_uncond=zeros, text_encoders=_encoders(family, names))
    extras = family.extras
    if has_mask_channels(unet.config, vae.config.latent_channels, source=source):
        extras += (InpaintingChannels(),)
    if unet.config.time_cond_proj_dim is not None:
        extras += (GuidanceEmbedding(unet.config.time_cond_proj_dim),)
    return dataclasses.replace(family, extras=extras)


def family_of_text_encoders(folder: pathlib.Path) -> Family:
    """The family of a folder with text encoders, by its unet/config.json or by their number."""
    names = [e.component for e in SDXL.text_encoders if (folder / e.component).is_dir()]
    if not names:
        first = SD.text_encoders[0]
        raise InputError(
            f"text_encoder: got {folder} without {first.component}, expected a folder with "
            f"{first.component}/ and {first.tokenizer}/"
        )
    config = folder / SD.network / CONFIG
    pooled = len(names) > 1
    if config.is_file():
        pooled = read_object(config).get("addition_embed_type") is not None
    family = SDXL if pooled else SD
    return dataclasses.replace(family, text_encoders=_encoders(family, names))


def _encoders(family: Family, names: Sequence[str]) -> tuple[TextEncoder, ...]:
    """The text encoders of these names; the last one gives the pooled embedding if one does."""
    last = family.text_encoders[-1]
    own = [each for each in SDXL.text_encoders if each.component in names]
    return tuple(
        dataclasses.replace(each, layer=last.layer, pooled=last.pooled and each is own[-1])
        for each in own
    )


def _text_family(unet: UNet2DConditionConfig, encoders: Sequence[CLIPTextModel]) -> Family:
    """The family by what the UNet takes; InputError if the encoders do not fit it."""
    for name, accepted in CONDITIONING.items():
        if getattr(unet, name) not in accepted:
            raise InputError(
                f"UNet: got {name} {getattr(unet, name)}, expected that of Stable Diffusion"
            )
    width = sum(encoder.config.hidden_size for encoder in encoders)
    wanted = unet.per_block("cross_attention_dim")[0]
    if width != wanted:
        raise InputError(
            f"text encoders: got hidden states of width {width}, expected {wanted}, as the UNet has"
        )
    if unet.addition_embed_type is None:
        if len(encoders) != 1:
            raise InputError(f"text encoders: got {len(encoders)}, expected 1")
        return SD
    pooled = encoders[-1].config.projection_dim
    if encoders[-1].text_projection is None or pooled is None:
        raise InputError(
            "text encoders: got a last one without text_projection, expected one with it"
        )
    numbers = (unet.projection_class_embeddings_input_dim or 0) - pooled
    for family, extra in ((SDXL, SizesAndCrop), (SDXL_REFINER, AestheticScore)):
        if numbers == extra.num_time_ids * (unet.addition_time_embed_dim or 0):
            return family
    raise InputError(
        f"UNet: got {numbers} inputs besides {pooled} of the pooled embedding, expected "
        f"5 or 6 times {unet.addition_time_embed_dim}"
    )
