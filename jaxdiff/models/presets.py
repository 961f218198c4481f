"""Published models as data: the networks of Stable Diffusion, FLUX.1 and their relatives.

A preset's config says the same as the config.json of the repository it names, or as diffusers would
say what the original config says; its parameter count is that of the published weights.
"""

import dataclasses
from typing import Any

from flax import nnx

from jaxdiff.core.validate import one_of
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from jaxdiff.models.build import abstract
from jaxdiff.models.chroma.config import ChromaTransformer2DConfig
from jaxdiff.models.chroma.module import ChromaTransformer2DModel
from jaxdiff.models.clip import CLIPTextModel, CLIPVisionModel
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.models.dit.config import DiTTransformer2DConfig
from jaxdiff.models.dit.module import DiTTransformer2DModel
from jaxdiff.models.flux.config import FluxTransformer2DConfig
from jaxdiff.models.flux.module import FluxTransformer2DModel
from jaxdiff.models.glide_text.config import GlideTextConfig
from jaxdiff.models.glide_text.module import GlideTextModel
from jaxdiff.models.ldm_bert.config import LDMBertConfig
from jaxdiff.models.ldm_bert.module import LDMBertModel
from jaxdiff.models.multilingual_clip.config import MultilingualCLIPConfig
from jaxdiff.models.multilingual_clip.module import MultilingualCLIP
from jaxdiff.models.prior.config import PriorTransformerConfig
from jaxdiff.models.prior.module import PriorTransformer
from jaxdiff.models.sd3.config import SD3Transformer2DConfig
from jaxdiff.models.sd3.module import SD3Transformer2DModel
from jaxdiff.models.t5.config import T5Config
from jaxdiff.models.t5.module import T5EncoderModel
from jaxdiff.models.unclip import (
    StableUnCLIPImageNormalizer,
    StableUnCLIPImageNormalizerConfig,
    UnCLIPTextProjConfig,
    UnCLIPTextProjModel,
)
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.unet.unet_2d import UNet2DModel
from jaxdiff.models.unet.unet_2d_config import UNet2DConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.models.vq_model import VQModel, VQModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """One published network."""

    cls: type[nnx.Module]
    config: Any
    source: str  # repository and folder
    parameters: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # more arguments of cls

    def abstract(self, **options: Any) -> nnx.Module:
        """The module with shapes for weights; `options` are dtypes and the like."""
        return abstract(self.cls, self.config, **self.options, **options)


def _unet(source: str, parameters: int, **fields: Any) -> Preset:
    return Preset(
        cls=UNet2DConditionModel,
        config=UNet2DConditionConfig(**fields),
        source=f"{source}/unet",
        parameters=parameters,
    )


def _sd3(source: str, parameters: int, depth: int, **fields: Any) -> Preset:
    config = SD3Transformer2DConfig(
        num_layers=depth,
        num_attention_heads=depth,
        caption_projection_dim=64 * depth,
        **fields,
    )
    return Preset(
        cls=SD3Transformer2DModel,
        config=config,
        source=f"{source}/transformer",
        parameters=parameters,
    )


def _flux(source: str, parameters: int, **fields: Any) -> Preset:
    return Preset(
        cls=FluxTransformer2DModel,
        config=FluxTransformer2DConfig(**fields),
        source=f"black-forest-labs/{source}/transformer",
        parameters=parameters,
    )


def _vae(
    source: str,
    parameters: int,
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
    **fields: Any,
) -> Preset:
    config = AutoencoderKLConfig(
        block_out_channels=block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
        layers_per_block=2,
        **fields,
    )
    return Preset(cls=AutoencoderKL, config=config, source=f"{source}/vae", parameters=parameters)


def _dit(size: int) -> Preset:
    # Each of the 28 blocks has its own copy of one embedding of timesteps and classes.
    return Preset(
        cls=DiTTransformer2DModel,
        config=DiTTransformer2DConfig(sample_size=size // 8, out_channels=8),
        source=f"facebook/DiT-XL-2-{size}/transformer",
        parameters=749_826_464,
    )


def _tiny(source: str, parameters: int, **fields: Any) -> Preset:
    config = AutoencoderTinyConfig(**fields)
    return Preset(cls=AutoencoderTiny, config=config, source=source, parameters=parameters)


def _text(source: str, parameters: int, *, with_projection: bool = False, **fields: Any) -> Preset:
    # All of these say end-of-text 2 (see models.clip for what that means) and bos 0.
    return Preset(
        cls=CLIPTextModel,
        config=CLIPTextConfig(bos_token_id=0, eos_token_id=2, **fields),
        source=source,
        parameters=parameters,
        options={"with_projection": with_projection},
    )


def _image(source: str, parameters: int, **fields: Any) -> Preset:
    return Preset(
        cls=CLIPVisionModel,
        config=CLIPVisionConfig(num_attention_heads=16, patch_size=14, **fields),
        source=f"{source}/image_encoder",
        parameters=parameters,
        options={"with_projection": True},
    )


_SD15 = "runwayml/stable-diffusion-v1-5"
_SD21 = "stabilityai/stable-diffusion-2-1"
_XL = "stabilityai/stable-diffusion-xl-base-1.0"
_REFINER = "stabilityai/stable-diffusion-xl-refiner-1.0"
_SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
_LDM_CLASSES = "CompVis/latent-diffusion/configs/latent-diffusion/cin256-v2.yaml"
_LDM = "CompVis/ldm-text2im-large-256"
_KARLO = "kakaobrain/karlo-v1-alpha"
_GLIDE = "openai/glide-text2im"
_SDXL_CONDITIONING = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
_XL_ATTENTION = {"use_linear_projection": True, "upcast_attention": None}
# The UNets of guided diffusion (2105.05233) that attend to a context beside their pixels.
_ADDED_KV: dict[str, Any] = {
    "sample_size": 64,
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "layers_per_block": 3,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}
_GLIDE_UNET: dict[str, Any] = {
    **_ADDED_KV,
    "out_channels": 6,
    "cross_attention_dim": 512,
    "class_embed_type": "identity",
    "learned_variance": True,
}
_KANDINSKY: dict[str, Any] = {
    **_ADDED_KV,
    "out_channels": 8,
    "block_out_channels": (384, 768, 1152, 1536),
    "cross_attention_dim": 768,
}
_KANDINSKY_21: dict[str, Any] = {
    **_KANDINSKY,
    "addition_embed_type": "text_image",
    "encoder_hid_dim": 1024,
    "encoder_hid_dim_type": "text_image_proj",
}
_KANDINSKY_22: dict[str, Any] = {
    **_KANDINSKY,
    "addition_embed_type": "image",
    "encoder_hid_dim": 1280,
    "encoder_hid_dim_type": "image_proj",
}

UNETS: dict[str, Preset] = {
    "sd15": _unet(_SD15, 859_520_964, sample_size=64, cross_attention_dim=768),
    "sd15-inpainting": _unet(
        "runwayml/stable-diffusion-inpainting",
        859_535_364,
        sample_size=64,
        in_channels=9,
        cross_attention_dim=768,
    ),
    "ldm-text2im": _unet(_LDM, 872_300_484, sample_size=32, cross_attention_dim=1280),
    "sd21": _unet(
        _SD21,
        865_910_724,
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
        upcast_attention=True,
    ),
    "sdxl-base": _unet(
        _XL,
        2_567_463_684,
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        projection_class_embeddings_input_dim=2816,
        **_SDXL_CONDITIONING,
        **_XL_ATTENTION,
    ),
    "sdxl-refiner": _unet(
        _REFINER,
        2_259_526_660,
        sample_size=128,
        down_block_types=(
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(384, 768, 1536, 1536),
        transformer_layers_per_block=4,
        attention_head_dim=(6, 12, 24, 24),
        cross_attention_dim=1280,
        projection_class_embeddings_input_dim=2560,
        **_SDXL_CONDITIONING,
        **_XL_ATTENTION,
    ),
    "kandinsky21": _unet("kandinsky-community/kandinsky-2-1", 1_228_661_768, **_KANDINSKY_21),
    "kandinsky21-inpaint": _unet(
        "kandinsky-community/kandinsky-2-1-inpaint", 1_228_679_048, in_channels=9, **_KANDINSKY_21
    ),
    "kandinsky22": _unet(
        "kandinsky-community/kandinsky-2-2-decoder", 1_253_057_288, **_KANDINSKY_22
    ),
    "kandinsky22-inpaint": _unet(
        "kandinsky-community/kandinsky-2-2-decoder-inpaint",
        1_253_074_568,
        in_channels=9,
        **_KANDINSKY_22,
    ),
    "kandinsky22-controlnet": _unet(
        "kandinsky-community/kandinsky-2-2-controlnet-depth",
        1_253_429_212,
        **{**_KANDINSKY_22, "addition_embed_type": "image_hint", "in_channels": 8},
    ),
    "karlo-decoder": Preset(
        cls=UNet2DConditionModel,
        config=UNet2DConditionConfig(
            in_channels=3,
            out_channels=6,
            block_out_channels=(320, 640, 960, 1280),
            cross_attention_dim=1536,
            class_embed_type="identity",
            **_ADDED_KV,
        ),
        source=f"{_KARLO}/decoder",
        parameters=885_439_686,
    ),
    # Those for inpainting have four channels more going in.
    "glide-base": _unet(
        f"{_GLIDE}/base",
        308_334_918,
        in_channels=3,
        block_out_channels=(192, 384, 576, 768),
        **_GLIDE_UNET,
    ),
    "glide-upsample": _unet(
        f"{_GLIDE}/upsample",
        321_665_478,
        **_GLIDE_UNET
        | {
            "sample_size": 256,
            "in_channels": 6,
            "down_block_types": (
                *("ResnetDownsampleBlock2D",) * 3,
                *("SimpleCrossAttnDownBlock2D",) * 3,
            ),
            "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, *("ResnetUpsampleBlock2D",) * 3),
            "block_out_channels": (192, 192, 384, 384, 768, 768),
            "layers_per_block": 2,
        },
    ),
    "if-i-xl": _unet(
        "DeepFloyd/IF-I-XL-v1.0",
        4_304_695_110,
        in_channels=3,
        out_channels=6,
        act_fn="gelu",
        block_out_channels=(704, 1408, 2112, 2816),
        cross_attention_dim=2816,
        cross_attention_norm="group_norm",
        addition_embed_type="text",
        encoder_hid_dim=4096,
        encoder_hid_dim_type="text_proj",
        **_ADDED_KV,
    ),
    "stable-unclip-h": _unet(
        "stabilityai/stable-diffusion-2-1-unclip",
        870_173_124,
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
        upcast_attention=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2048,
    ),
    "sd-x4-upscaler": _unet(
        "stabilityai/stable-diffusion-x4-upscaler",
        473_398_020,
        sample_size=128,
        in_channels=7,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        block_out_channels=(256, 512, 512, 1024),
        cross_attention_dim=1024,
        only_cross_attention=(True, True, True, False),
        use_linear_projection=True,
        num_class_embeds=1000,
    ),
    # One for six steps and one for the last have these shapes.
    "karlo-super-resolution": Preset(
        cls=UNet2DModel,
        config=UNet2DConfig(
            sample_size=256,
            in_channels=6,
            down_block_types=("ResnetDownsampleBlock2D",) * 4,
            up_block_types=("ResnetUpsampleBlock2D",) * 4,
            block_out_channels=(320, 640, 960, 1280),
            layers_per_block=3,
            add_attention=False,
        ),
        source=f"{_KARLO}/super_res_first",
        parameters=691_579_523,
    ),
    # Beside it the model has a table of classes, [1001, 512].
    "ldm-cin256": Preset(
        cls=UNet2DConditionModel,
        config=UNet2DConditionConfig(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            block_out_channels=(192, 384, 576, 960),
            cross_attention_dim=512,
            attention_head_dim=1,
        ),
        source=_LDM_CLASSES,
        parameters=400_920_579,
    ),
}

# Parameters include those of the stored positions, which diffusers does not count.
TRANSFORMERS: dict[str, Preset] = {
    "sd3-medium": _sd3(_SD3, 2_084_951_104, 24, pos_embed_max_size=192),
    "sd35-medium": _sd3(
        "stabilityai/stable-diffusion-3.5-medium",
        2_469_663_936,
        24,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    "sd35-large": _sd3(
        "stabilityai/stable-diffusion-3.5-large",
        8_146_280_768,
        38,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    ),
    "flux-schnell": _flux("FLUX.1-schnell", 11_891_178_560),
    "flux-dev": _flux("FLUX.1-dev", 11_901_408_320, guidance_embeds=True),
    "flux-fill": _flux(
        "FLUX.1-Fill-dev", 11_902_391_360, in_channels=384, out_channels=64, guidance_embeds=True
    ),
    "chroma": Preset(
        cls=ChromaTransformer2DModel,
        config=ChromaTransformer2DConfig(),
        source="lodestones/Chroma1-HD/transformer",
        parameters=8_899_983_424,
    ),
    "dit-xl-2-256": _dit(256),
    "dit-xl-2-512": _dit(512),
}

_NO_QUANT = {
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

VAES: dict[str, Preset] = {
    "sd": _vae(_SD15, 83_653_863, sample_size=512),
    "sdxl": _vae(_XL, 83_653_863, sample_size=1024, scaling_factor=0.13025),
    "sd3": _vae(_SD3, 83_819_683, scaling_factor=1.5305, shift_factor=0.0609, **_NO_QUANT),
    "flux": _vae(
        "black-forest-labs/FLUX.1-schnell",
        83_819_683,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        **_NO_QUANT,
    ),
    "sd-x4-upscaler": _vae(
        "stabilityai/stable-diffusion-x4-upscaler",
        55_325_927,
        block_out_channels=(128, 256, 512),
        sample_size=256,
        scaling_factor=0.08333,
    ),
    "vq-f4": Preset(
        cls=VQModel,
        config=VQModelConfig(
            block_out_channels=(128, 256, 512),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
            num_vq_embeddings=8192,
            vq_embed_dim=3,
            scaling_factor=1.0,
        ),
        source=_LDM_CLASSES,
        parameters=55_322_782,
    ),
    "kandinsky-movq": Preset(
        cls=VQModel,
        config=VQModelConfig(
            block_out_channels=(128, 256, 256, 512),
            down_block_types=(*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
            layers_per_block=2,
            latent_channels=4,
            num_vq_embeddings=16384,
            vq_embed_dim=4,
            norm_type="spatial",
        ),
        source="kandinsky-community/kandinsky-2-2-decoder/movq",
        parameters=67_832_495,
    ),
    "taesd": _tiny("madebyollin/taesd", 2_445_063),
    "taef1": _tiny("madebyollin/taef1", 2_458_899, latent_channels=16),
}

_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_attention_heads": 12,
}

TEXT_ENCODERS: dict[str, Preset] = {
    "clip-l": _text(f"{_SD15}/text_encoder", 123_060_480, **_CLIP_L),
    "clip-l-projection": _text(
        f"{_SD3}/text_encoder", 123_650_304, with_projection=True, **_CLIP_L
    ),
    # The last of the 24 layers is left out: its penultimate output is this one's last.
    "openclip-h": _text(
        f"{_SD21}/text_encoder",
        340_387_840,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
    ),
    "openclip-bigg": _text(
        f"{_XL}/text_encoder_2",
        694_659_840,
        with_projection=True,
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
    ),
}

TEXT_ENCODERS["t5-xxl"] = Preset(
    cls=T5EncoderModel,
    config=T5Config(
        d_model=4096,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    ),
    source=f"{_SD3}/text_encoder_3",
    parameters=4_762_310_656,
)

TEXT_ENCODERS["ldm-bert"] = Preset(
    cls=LDMBertModel, config=LDMBertConfig(), source=f"{_LDM}/bert", parameters=581_994_042
)

# In the file of each of GLIDE's networks.
TEXT_ENCODERS["glide"] = Preset(
    cls=GlideTextModel,
    config=GlideTextConfig(),
    source=f"{_GLIDE}/base/text_encoder",
    parameters=76_695_808,
)

TEXT_ENCODERS["kandinsky21-mclip"] = Preset(
    cls=MultilingualCLIP,
    config=MultilingualCLIPConfig(
        vocab_size=250002,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    ),
    source="kandinsky-community/kandinsky-2-1/text_encoder",
    parameters=560_677_632,
)

IMAGE_ENCODERS: dict[str, Preset] = {
    "clip-l": _image(
        "kandinsky-community/kandinsky-2-1-prior",
        303_966_208,
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=768,
        num_hidden_layers=24,
    ),
    "openclip-h": _image(
        _SD21 + "-unclip",
        632_076_800,
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1024,
        num_hidden_layers=32,
        hidden_act="gelu",
    ),
    "openclip-bigg": _image(
        "kandinsky-community/kandinsky-2-2-prior",
        1_844_907_264,
        hidden_size=1664,
        intermediate_size=8192,
        projection_dim=1280,
        num_hidden_layers=48,
        hidden_act="gelu",
    ),
}

PRIORS: dict[str, Preset] = {
    "kandinsky21": Preset(
        cls=PriorTransformer,
        config=PriorTransformerConfig(),
        source="kandinsky-community/kandinsky-2-1-prior/prior",
        parameters=1_022_030_080,
    ),
    "kandinsky22": Preset(
        cls=PriorTransformer,
        config=PriorTransformerConfig(embedding_dim=1280),
        source="kandinsky-community/kandinsky-2-2-prior/prior",
        parameters=1_026_225_920,
    ),
}

UNCLIP: dict[str, Preset] = {
    "karlo-text-proj": Preset(
        cls=UnCLIPTextProjModel,
        config=UnCLIPTextProjConfig(time_embed_dim=1280, cross_attention_dim=1536),
        source=f"{_KARLO}/text_proj",
        parameters=7_878_400,
    ),
    "stable-unclip-h-normalizer": Preset(
        cls=StableUnCLIPImageNormalizer,
        config=StableUnCLIPImageNormalizerConfig(embedding_dim=1024),
        source="stabilityai/stable-diffusion-2-1-unclip/image_normalizer",
        parameters=2_048,
    ),
}

PRESETS: dict[str, dict[str, Preset]] = {
    "unet": UNETS,
    "prior": PRIORS,
    "unclip": UNCLIP,
    "transformer": TRANSFORMERS,
    "vae": VAES,
    "text": TEXT_ENCODERS,
    "image": IMAGE_ENCODERS,
}


def preset(kind: str, name: str) -> Preset:
    """The published network `name` of `kind`, one of PRESETS; InputError if unknown."""
    return PRESETS[one_of("kind of network", kind, PRESETS)][one_of(kind, name, PRESETS[kind])]
