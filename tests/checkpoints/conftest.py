"""Small components and a whole pipeline folder to read, break and write."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.checkpoints.components import Component
from jaxdiff.checkpoints.pipelines import PipelineComponents, write_pipeline
from jaxdiff.checkpoints.tokenizers import TokenizerFiles
from jaxdiff.core.configs import to_mapping
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.chroma.config import ChromaTransformer2DConfig
from jaxdiff.models.chroma.module import ChromaTransformer2DModel
from jaxdiff.models.classifier import LatentClassifier, LatentClassifierConfig
from jaxdiff.models.clip import CLIPModel, CLIPTextModel, CLIPVisionModel
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
from jaxdiff.models.pixart.config import PixArtTransformer2DConfig
from jaxdiff.models.pixart.module import PixArtTransformer2DModel
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
from jaxdiff.models.unet.class_conditional import (
    ClassConditionalUNet2DConfig,
    ClassConditionalUNet2DModel,
)
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.unet.unet_2d import UNet2DModel
from jaxdiff.models.unet.unet_2d_config import UNet2DConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.models.vq_model import VQModel, VQModelConfig

TEXT = CLIPTextConfig(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=16,
    projection_dim=6,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=5,
)
VISION = CLIPVisionConfig(
    hidden_size=8,
    intermediate_size=16,
    projection_dim=6,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
UNET = UNet2DConditionConfig(
    sample_size=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=8,
    attention_head_dim=2,
)
CLASSES = ClassConditionalUNet2DConfig(**to_mapping(UNET), num_classes=3)
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 1,
    "sample_size": 8,
}
DIT = DiTTransformer2DConfig(**TRANSFORMER, out_channels=8, num_embeds_ada_norm=3)
SUPER_RESOLUTION = UNet2DConfig(
    in_channels=6,
    block_out_channels=(8, 16),
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    num_class_embeds=5,
)
PRIOR = PriorTransformerConfig(
    num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=6, num_embeddings=5
)
TEXT_PROJ = UnCLIPTextProjConfig(clip_embeddings_dim=6, time_embed_dim=8, cross_attention_dim=4)
NORMALIZER = StableUnCLIPImageNormalizerConfig(embedding_dim=6)
PIXART = PixArtTransformer2DConfig(**TRANSFORMER, cross_attention_dim=8, caption_channels=6)
TOKENS = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 6,
    "num_attention_heads": 2,
    "joint_attention_dim": 5,
    "axes_dims_rope": (2, 2, 2),
}
FLUX = FluxTransformer2DConfig(**TOKENS, pooled_projection_dim=6, guidance_embeds=True)
CHROMA = ChromaTransformer2DConfig(**TOKENS, approximator_hidden_dim=8, approximator_layers=1)
SD3 = SD3Transformer2DConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=4,
    num_attention_heads=2,
    joint_attention_dim=6,
    caption_projection_dim=8,
    pooled_projection_dim=5,
    pos_embed_max_size=4,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
VQ = VQModelConfig(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=6)
VAE = AutoencoderKLConfig(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
TINY_VAE = AutoencoderTinyConfig(
    encoder_block_out_channels=(4, 4),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 0),
    num_decoder_blocks=(0, 1),
)
CLASSIFIER = LatentClassifierConfig(
    sample_size=4,
    in_channels=2,
    block_out_channels=(4, 8),
    layers_per_block=1,
    attention_head_dim=4,
    norm_num_groups=2,
    group_names=("background", "colours"),
    group_labels=(("white", "grey"), ("red", "green", "blue")),
    group_exclusive=(True, False),
)
T5 = T5Config(vocab_size=12, d_model=8, d_kv=2, d_ff=10, num_layers=2, num_heads=2)
LDM_BERT = LDMBertConfig(
    vocab_size=12,
    max_position_embeddings=5,
    encoder_layers=2,
    encoder_ffn_dim=10,
    encoder_attention_heads=2,
    head_dim=3,
    d_model=8,
)
GLIDE_TEXT = GlideTextConfig(
    vocab_size=12,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=5,
    projection_dim=6,
    pad_token_id=11,
)
MULTILINGUAL_CLIP = MultilingualCLIPConfig(
    vocab_size=12,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=10,
    max_position_embeddings=9,
    transformerDimensions=8,
    numDims=6,
)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "skip_prk_steps": True,
    "trained_betas": None,
}
FILES = {
    "vocab.json": b'{"a": 0, "b": 1}',
    "merges.txt": b"#version: 0.2\n",
    "tokenizer_config.json": b'{"model_max_length": 5}',
}


def build(cls, *configs, **options):
    """A component with random weights; drawing them with numpy spares compiling a program."""
    module = abstract(cls, *configs, **options)
    rng = np.random.default_rng(0)
    values = {
        path: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)
        for path, leaf in param_dict(module).items()
    }
    return Component(module=with_params(module, values))


@pytest.fixture(scope="session")
def components():
    """One component of every class, by class name."""
    return {
        "UNet2DConditionModel": build(UNet2DConditionModel, UNET),
        "UNet2DModel": build(UNet2DModel, SUPER_RESOLUTION),
        "PriorTransformer": build(PriorTransformer, PRIOR),
        "UnCLIPTextProjModel": build(UnCLIPTextProjModel, TEXT_PROJ),
        "StableUnCLIPImageNormalizer": build(StableUnCLIPImageNormalizer, NORMALIZER),
        "DiTTransformer2DModel": build(DiTTransformer2DModel, DIT),
        "PixArtTransformer2DModel": build(PixArtTransformer2DModel, PIXART),
        "FluxTransformer2DModel": build(FluxTransformer2DModel, FLUX),
        "ChromaTransformer2DModel": build(ChromaTransformer2DModel, CHROMA),
        "SD3Transformer2DModel": build(SD3Transformer2DModel, SD3),
        "ClassConditionalUNet2DModel": build(ClassConditionalUNet2DModel, CLASSES),
        "AutoencoderKL": build(AutoencoderKL, VAE),
        "VQModel": build(VQModel, VQ),
        "AutoencoderTiny": build(AutoencoderTiny, TINY_VAE),
        "LatentClassifier": build(LatentClassifier, CLASSIFIER),
        "CLIPTextModel": build(CLIPTextModel, TEXT),
        "CLIPTextModelWithProjection": build(CLIPTextModel, TEXT, with_projection=True),
        "CLIPVisionModel": build(CLIPVisionModel, VISION),
        "CLIPVisionModelWithProjection": build(CLIPVisionModel, VISION, with_projection=True),
        "LDMBertModel": build(LDMBertModel, LDM_BERT),
        "MultilingualCLIP": build(MultilingualCLIP, MULTILINGUAL_CLIP),
        "T5EncoderModel": build(T5EncoderModel, T5),
        "GlideTextModel": build(GlideTextModel, GLIDE_TEXT),
        "CLIPModel": build(CLIPModel, TEXT, VISION, 6),
    }


@pytest.fixture(scope="session")
def parts(components):
    """The parts of a small text-to-image pipeline."""
    return PipelineComponents(
        components={
            "unet": components["UNet2DConditionModel"],
            "vae": components["AutoencoderKL"],
            "text_encoder": components["CLIPTextModel"],
        },
        scheduler=SCHEDULER,
        tokenizers={"tokenizer": TokenizerFiles(class_name="CLIPTokenizer", files=FILES)},
        defaults={"guidance_scale": 5.0, "steps": 20},
    )


@pytest.fixture
def folder(parts, tmp_path):
    """A pipeline folder of a test's own."""
    write_pipeline(tmp_path / "model", parts)
    return tmp_path / "model"
