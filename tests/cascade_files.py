"""Small random models of a cascade: DeepFloyd IF's stages, and Stable Diffusion's upscaler."""

import dataclasses

import tiny

from jaxdiff.checkpoints.pipelines import read_pipeline
from jaxdiff.models.t5.config import T5Config
from jaxdiff.models.t5.module import T5EncoderModel
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel

STATES = 10
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
