"""Small random models after unCLIP: Stable unCLIP, with and without its prior, and Karlo."""

import dataclasses

import cascade_files
import tiny

from jaxdiff.checkpoints.pipelines import read_pipeline
from jaxdiff.models.clip import CLIPVisionModel
from jaxdiff.models.clip_config import CLIPVisionConfig
from jaxdiff.models.unclip import (
    StableUnCLIPImageNormalizer,
    StableUnCLIPImageNormalizerConfig,
    UnCLIPTextProjConfig,
    UnCLIPTextProjModel,
)
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.unet.unet_2d import UNet2DModel
from jaxdiff.models.unet.unet_2d_config import UNet2DConfig

WIDTH = cascade_files.WIDTH  # of embeddings of images
VISION = CLIPVisionConfig(
    hidden_size=8,
    intermediate_size=16,
    projection_dim=WIDTH,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
NOISING = {"image_noising_scheduler": cascade_files.COSINE}


def _decoder(folder):
    plain = read_pipeline(tiny.write_tiny(folder))
    config = dataclasses.replace(
        plain.components["unet"].module.config,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * WIDTH,
    )
    normaliser = StableUnCLIPImageNormalizerConfig(embedding_dim=WIDTH)
    unet = tiny.random_component(UNet2DConditionModel, config, seed=4)
    own = tiny.random_component(StableUnCLIPImageNormalizer, normaliser, seed=5)
    return dataclasses.replace(
        plain,
        components={**plain.components, "unet": unet, "image_normalizer": own},
        noising_schedulers=NOISING,
        absent=(),
    )


def variations(folder):
    """Stable unCLIP that varies images."""
    plain = _decoder(folder)
    encoder = tiny.random_component(CLIPVisionModel, VISION, True, seed=6)
    return dataclasses.replace(
        plain,
        class_name="StableUnCLIPImg2ImgPipeline",
        components={**plain.components, "image_encoder": encoder},
        image_processors={"feature_extractor": {"size": 8, "crop_size": 8}},
        defaults={"steps": 2, "guidance_scale": 3.0},
    )


def with_prior(folder):
    """Stable unCLIP with a prior in one folder."""
    plain, prior = _decoder(folder / "a"), cascade_files.prior(folder / "b")
    more = {
        "prior": prior.components["prior"],
        "prior_text_encoder": prior.components["text_encoder"],
    }
    return dataclasses.replace(
        plain,
        class_name="StableUnCLIPPipeline",
        components={**plain.components, **more},
        tokenizers={**plain.tokenizers, "prior_tokenizer": prior.tokenizers["tokenizer"]},
        stage_schedulers={"prior_scheduler": prior.scheduler},
        defaults={"prior": {"steps": 3}, "decoder": {"steps": 2, "guidance_scale": 3.0}},
    )


DECODER = dataclasses.replace(
    cascade_files.FIRST,
    encoder_hid_dim=None,
    encoder_hid_dim_type=None,
    class_embed_type="identity",
)
ENLARGING = UNet2DConfig(
    sample_size=16,
    in_channels=6,
    down_block_types=("ResnetDownsampleBlock2D",) * 2,
    up_block_types=("ResnetUpsampleBlock2D",) * 2,
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    add_attention=False,
)


def karlo(folder):
    """Prior, decoder of 8 x 8 pixels and super-resolution to 16 x 16 in one folder."""
    prior = cascade_files.prior(folder)
    text_proj = UnCLIPTextProjConfig(
        clip_extra_context_tokens=2,
        clip_embeddings_dim=WIDTH,
        time_embed_dim=DECODER.time_width,
        cross_attention_dim=8,
    )
    components = {name: prior.components[name] for name in ("prior", "text_encoder")}
    components |= {
        "decoder": tiny.random_component(UNet2DConditionModel, DECODER, seed=4),
        "text_proj": tiny.random_component(UnCLIPTextProjModel, text_proj, seed=5),
        "super_res_first": tiny.random_component(UNet2DModel, ENLARGING, seed=6),
        "super_res_last": tiny.random_component(UNet2DModel, ENLARGING, seed=7),
    }
    scheduler = {"_class_name": "UnCLIPScheduler", "variance_type": "fixed_small_log"}
    return dataclasses.replace(
        prior,
        class_name="UnCLIPPipeline",
        components=components,
        scheduler={},
        stage_schedulers={
            "prior_scheduler": prior.scheduler,
            "decoder_scheduler": scheduler | {"variance_type": "learned_range"},
            "super_res_scheduler": scheduler,
        },
        absent=(),
        defaults={name: {"steps": 2} for name in ("prior", "decoder", "super_res")},
    )


def karlo_variations(folder):
    """As `karlo`, with an image encoder in place of the prior."""
    parts = karlo(folder)
    components = {name: each for name, each in parts.components.items() if name != "prior"}
    components["image_encoder"] = tiny.random_component(CLIPVisionModel, VISION, True, seed=8)
    schedulers = dict(parts.stage_schedulers)
    schedulers.pop("prior_scheduler")
    return dataclasses.replace(
        parts,
        class_name="UnCLIPImageVariationPipeline",
        components=components,
        stage_schedulers=schedulers,
        image_processors={"feature_extractor": {"size": 8, "crop_size": 8}},
    )
