"""Karlo against diffusers, whose pipelines are made of components: no folder of it loads there."""

import json

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from copier import nchw, randomise
from diffusers.pipelines.deprecated.unclip.pipeline_unclip import UnCLIPPipeline
from diffusers.pipelines.deprecated.unclip.pipeline_unclip_image_variation import (
    UnCLIPImageVariationPipeline,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from families import LENGTH, text_encoder, tokenizer
from PIL import Image
from tiny import first_devices

import jaxdiff
from jaxdiff.families.karlo import ResizedImage
from jaxdiff.pipeline.cascade import Cascade
from jaxdiff.samplers.base import INITIAL_NOISE_STEP, per_sample_keys, step_noise

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LIMIT = 1e-3  # relative error of the result
STEPS, SEED, WIDTH = 20, 7, 12
PROMPT = "abc"
SMALL, LARGE = 8, 16  # sides of the images of the decoder, and enlarged
FIXED = {"variance_type": "fixed_small_log"}
BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}


def shared_parts():
    """The components that both pipelines have."""
    decoder = diffusers.UNet2DConditionModel(
        **BLOCKS,
        sample_size=SMALL,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    text_proj = UnCLIPTextProjModel(
        clip_extra_context_tokens=3,
        clip_embeddings_dim=WIDTH,
        time_embed_dim=32,
        cross_attention_dim=16,
    )
    enlarging = {
        **BLOCKS,
        "sample_size": LARGE,
        "in_channels": 6,
        "out_channels": 3,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "add_attention": False,
        "resnet_time_scale_shift": "scale_shift",
    }
    text = transformers.CLIPTextModelWithProjection
    return {
        "decoder": randomise(decoder, 1),
        "text_proj": randomise(text_proj, 2),
        "text_encoder": text_encoder(text, 3, projection_dim=WIDTH, eos_token_id=22),
        "tokenizer": tokenizer("!"),
        "super_res_first": randomise(diffusers.UNet2DModel(**enlarging), 4),
        "super_res_last": randomise(diffusers.UNet2DModel(**enlarging), 5),
        "decoder_scheduler": diffusers.UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": diffusers.UnCLIPScheduler(**FIXED),
    }


def of_texts():
    network = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=6,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=LENGTH,
    )
    scheduler = diffusers.UnCLIPScheduler(**FIXED, prediction_type="sample", clip_sample_range=5.0)
    prior = randomise(network, 6)
    return UnCLIPPipeline(**shared_parts(), prior=prior, prior_scheduler=scheduler)


def of_images():
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return UnCLIPImageVariationPipeline(
        **shared_parts(),
        image_encoder=randomise(transformers.CLIPVisionModelWithProjection(vision), 7),
        feature_extractor=transformers.CLIPImageProcessor(size=8, crop_size=8),
    )


def in_float64(scheduler):
    """The tables of a scheduler, as 1 - alphas_cumprod[0] is off by 5e-4 of itself in float32.

    By as much the images of all stages would be darker.
    """
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)


def pair(make, folder):
    """diffusers' pipeline, and ours of its folder with the names that Karlo's file has."""
    theirs = make()
    theirs.save_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    for name in theirs.config:
        if name.endswith("_scheduler"):
            in_float64(getattr(theirs, name))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_proj": ["unclip", "UnCLIPTextProjModel"], "_diffusers_version": "0.15.0.dev0"}
    if "feature_extractor" in index:
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    ours = jaxdiff.load(folder, dtype="float32")
    return theirs, Cascade(*(first_devices(pipe, 1) for pipe in ours.pipes))


def noise(step, shape):
    made = np.array(step_noise(per_sample_keys([SEED]), step, shape, jnp.dtype("float32")))
    return torch.from_numpy(made) if len(shape) == 1 else nchw(made)


@pytest.fixture
def in_step(monkeypatch):
    """diffusers' noises of the steps of all stages are those of jaxdiff, the same in all rows."""

    def patch(*shapes):
        # There is no noise in the last step of each.
        draws = iter([(step, shape) for shape in shapes for step in range(STEPS - 1)])
        name = "diffusers.schedulers.scheduling_unclip.randn_tensor"
        monkeypatch.setattr(name, lambda wanted, *_, **__: noise(*next(draws)).expand(wanted))
        return draws

    return patch


PIXELS = (SMALL, SMALL, 3), (LARGE, LARGE, 3)
LATENTS = {
    name: (INITIAL_NOISE_STEP, shape)
    for name, shape in zip(("decoder_latents", "super_res_latents"), PIXELS, strict=True)
}
COUNTS = {f"{name}_num_inference_steps": STEPS for name in ("decoder", "super_res")}


def close(got, want):
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < LIMIT, error


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_an_image_of_a_text(tmp_path, in_step, scale):
    theirs, ours = pair(of_texts, tmp_path)
    draws = in_step((WIDTH,), *PIXELS)
    latents = {name: noise(*draw) for name, draw in LATENTS.items()}
    want = theirs(
        PROMPT,
        prior_latents=noise(INITIAL_NOISE_STEP, (WIDTH,)),
        prior_num_inference_steps=STEPS,
        prior_guidance_scale=4.0 if scale > 1 else 1.0,
        decoder_guidance_scale=scale,
        output_type="np",
        **latents,
        **COUNTS,
    ).images
    assert next(draws, None) is None
    assert [pipe.defaults.steps for pipe in ours.pipes] == [25, 25, 7]
    own = {"guidance_scale": 4.0 if scale > 1 else 1.0, "steps": STEPS}
    stages = [{"guidance_scale": scale, "steps": STEPS}, {"steps": STEPS}]
    got = ours(PROMPT, seed=SEED, stage_options=stages, output="latent", **own)
    assert got.images.shape == (1, LARGE, LARGE, 3)
    close(got.images, want * 2 - 1)


def test_a_variation_of_an_image(tmp_path, in_step):
    theirs, ours = pair(of_images, tmp_path)
    draws = in_step(*PIXELS)
    pixels = np.random.default_rng(2).integers(0, 256, (20, 12, 3), np.uint8)
    latents = {name: noise(*draw) for name, draw in LATENTS.items()}
    picture = Image.fromarray(pixels)
    want = theirs(picture, output_type="np", **latents, **COUNTS).images
    assert next(draws, None) is None
    stage = {"steps": STEPS}
    got = ours("", image=picture, seed=SEED, steps=STEPS, stage_options=[stage], output="latent")
    close(got.images, want * 2 - 1)


def test_images_are_resized_as_in_pytorch():
    rng = np.random.default_rng(1)
    image = rng.uniform(-1, 1, (2, 5, 7, 3)).astype(np.float32)
    for size in ((20, 28), (12, 9), (5, 7)):
        want = torch.nn.functional.interpolate(
            nchw(image), size=list(size), mode="bicubic", align_corners=False, antialias=True
        )
        got = ResizedImage().resized(image, size)
        np.testing.assert_allclose(got.transpose(0, 3, 1, 2), want.numpy(), atol=2e-5)
