"""Small random models after unCLIP: Stable unCLIP, with and without its prior, and Karlo."""

import dataclasses

import cascade_files
import tiny

from jaxdiff.checkpoints.pipelines import read_pipeline
from jaxdiff.models.clip import CLIPVisionModel
from jaxdiff.models.clip_config import CLIPVisionConfig
from jaxdiff.models.unclip import StableUnCLIPImageNormalizer, StableUnCLIPImageNormalizerConfig
from jaxdiff.models.unet.module import UNet2DConditionModel

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
