"""Small random models: DeepFloyd IF's stages, Stable Diffusion's upscaler, Kandinsky's parts."""

import dataclasses

import tiny

from jaxdiff.checkpoints.pipelines import read_pipeline
from jaxdiff.models.clip import CLIPTextModel, CLIPVisionModel
from jaxdiff.models.clip_config import CLIPVisionConfig
from jaxdiff.models.multilingual_clip.config import MultilingualCLIPConfig
from jaxdiff.models.multilingual_clip.module import MultilingualCLIP
from jaxdiff.models.prior.config import PriorTransformerConfig
from jaxdiff.models.prior.module import PriorTransformer
from jaxdiff.models.t5.config import T5Config
from jaxdiff.models.t5.module import T5EncoderModel
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vq_model import VQModel, VQModelConfig

STATES = 10
WIDTH = 8  # of embeddings of images
FIRST = UNet2DConditionConfig(
    sample_size=8,
    in_channels=3,
    out_channels=6,
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    block_out_channels=(8, 8),
    norm_num_groups=4,
    cross_attention_dim=8,
    attention_head_dim=4,
    layers_per_block=1,
    encoder_hid_dim=STATES,
    encoder_hid_dim_type="text_proj",
)
SECOND = dataclasses.replace(FIRST, sample_size=16, in_channels=6, class_embed_type="timestep")
COSINE = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
IF_SCHEDULER = COSINE | {
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
}


def first(folder):
    """The first stage, from text to 8 x 8 pixels."""
    plain = read_pipeline(tiny.write_tiny(folder))
    words = plain.components["text_encoder"].module.config.vocab_size
    text = T5Config(
        vocab_size=words,
        d_model=STATES,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    components = {
        "unet": tiny.random_component(UNet2DConditionModel, FIRST, seed=1),
        "text_encoder": tiny.random_component(T5EncoderModel, text, seed=2),
    }
    return dataclasses.replace(
        plain,
        class_name="IFPipeline",
        components=components,
        scheduler=IF_SCHEDULER | {"sample_max_value": 1.5},
        absent=("safety_checker", "feature_extractor", "watermarker"),
        defaults={"steps": 3},
    )


def second(folder):
    """The second stage, to 16 x 16 pixels."""
    parts = first(folder)
    unet = tiny.random_component(UNet2DConditionModel, SECOND, seed=3)
    return dataclasses.replace(
        parts,
        class_name="IFSuperResolutionPipeline",
        components={**parts.components, "unet": unet},
        scheduler=IF_SCHEDULER | {"sample_max_value": 1.0},
        noising_schedulers={"image_noising_scheduler": COSINE},
    )


def upscaler(folder):
    """A model whose images have twice the side of those that it enlarges."""
    plain = read_pipeline(tiny.write_tiny(folder))
    config = dataclasses.replace(
        plain.components["unet"].module.config, in_channels=7, num_class_embeds=1000
    )
    unet = tiny.random_component(UNet2DConditionModel, config, seed=4)
    return dataclasses.replace(
        plain,
        class_name="StableDiffusionUpscalePipeline",
        components={**plain.components, "unet": unet},
        noising_schedulers={"low_res_scheduler": COSINE},
        options={"max_noise_level": 350},
        defaults={"steps": 2},
    )


UNCLIP = {
    "_class_name": "UnCLIPScheduler",
    "prediction_type": "sample",
    "variance_type": "fixed_small_log",
    "clip_sample_range": 5.0,
}


def prior(folder):
    plain = read_pipeline(tiny.write_tiny(folder))
    text = plain.components["text_encoder"].module.config
    end = text.vocab_size - 1  # where the pooled embedding is
    text = dataclasses.replace(text, projection_dim=WIDTH, eos_token_id=end)
    network = PriorTransformerConfig(
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        embedding_dim=WIDTH,
        num_embeddings=text.max_position_embeddings,
    )
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return dataclasses.replace(
        plain,
        class_name="KandinskyV22PriorPipeline",
        components={
            "prior": tiny.random_component(PriorTransformer, network, seed=1),
            "text_encoder": tiny.random_component(CLIPTextModel, text, True, seed=2),
            "image_encoder": tiny.random_component(CLIPVisionModel, vision, True, seed=3),
        },
        scheduler=UNCLIP,
        defaults={"steps": 3},
    )


DECODER = UNet2DConditionConfig(
    sample_size=8,
    in_channels=4,
    out_channels=8,
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    block_out_channels=(8, 8),
    norm_num_groups=4,
    cross_attention_dim=WIDTH,
    attention_head_dim=4,
    layers_per_block=1,
    addition_embed_type="image",
    encoder_hid_dim=WIDTH,
    encoder_hid_dim_type="image_proj",
)


def decoder(folder, **fields):
    plain = read_pipeline(tiny.write_tiny(folder))
    unet = dataclasses.replace(DECODER, **fields)
    movq = VQModelConfig(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=8,
        norm_type="spatial",
    )
    return dataclasses.replace(
        plain,
        class_name="KandinskyV22Pipeline",
        components={
            "unet": tiny.random_component(UNet2DConditionModel, unet, seed=1),
            "movq": tiny.random_component(VQModel, movq, seed=2),
        },
        tokenizers={},
        scheduler={"_class_name": "DDIMScheduler", "clip_sample": False},
        defaults={"steps": 2, "height": 16, "width": 16},
    )


def text_decoder(folder, **fields):
    """Kandinsky 2.1's decoder, which reads a text, too."""
    of_text = {
        "addition_embed_type": "text_image",
        "encoder_hid_dim": STATES,
        "encoder_hid_dim_type": "text_image_proj",
    }
    plain = read_pipeline(tiny.write_tiny(folder))
    parts = decoder(folder, **of_text | fields)
    vocabulary = plain.components["text_encoder"].module.config
    text = MultilingualCLIPConfig(
        vocab_size=vocabulary.vocab_size,
        pad_token_id=0,
        hidden_size=STATES,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=80,
        transformerDimensions=STATES,
        numDims=WIDTH,
    )
    return dataclasses.replace(
        parts,
        class_name="KandinskyPipeline",
        components={
            **parts.components,
            "text_encoder": tiny.random_component(MultilingualCLIP, text, seed=3),
        },
        tokenizers=plain.tokenizers,
    )
