"""Pixel cascades and upscalers against diffusers: whole pipelines, from the same noises."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from copier import image, nchw, randomise
from families import text_encoder, tokenizer
from PIL import Image
from tiny import first_devices

import jaxdiff
from jaxdiff.families.low_resolution import resize_bilinear
from jaxdiff.samplers.base import EXTRA_NOISE_STEP, per_sample_keys, step_noise

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LIMIT = 1e-3  # relative error of the final latents
STEPS, SEED = 20, 7
PROMPT, NEGATIVE = "abc de", "ij h"
STATES = 10
SIMPLE = {
    "sample_size": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 5,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": STATES,
    "encoder_hid_dim_type": "text_proj",
    "in_channels": 3,
    "out_channels": 6,
}
SECOND = {
    **SIMPLE,
    "sample_size": 16,
    "in_channels": 6,
    "class_embed_type": "timestep",
    "only_cross_attention": True,
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.4142,
    "mid_block_scale_factor": 1.4142,
    "time_embedding_act_fn": "gelu",
}
UPSCALER = {
    "sample_size": 8,
    "in_channels": 7,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "use_linear_projection": True,
    "only_cross_attention": (True, False),
    "num_class_embeds": 1000,
}
THRESHOLDING = {
    "variance_type": "learned_range",
    "beta_schedule": "squaredcos_cap_v2",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
}


def stage(cls, unet, highest, **parts):
    config = transformers.T5Config(
        vocab_size=40,
        d_model=STATES,
        d_kv=6,
        d_ff=30,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return cls(
        unet=randomise(diffusers.UNet2DConditionModel(**unet), 1),
        text_encoder=randomise(transformers.T5EncoderModel(config), 4),
        tokenizer=tokenizer("!"),
        scheduler=diffusers.DDPMScheduler(**THRESHOLDING, sample_max_value=highest),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **parts,
    )


def upscaler():
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.08333,
    )
    return diffusers.StableDiffusionUpscalePipeline(
        vae=randomise(vae, 2),
        unet=randomise(diffusers.UNet2DConditionModel(**UPSCALER), 1),
        text_encoder=text_encoder(transformers.CLIPTextModel, 3),
        tokenizer=tokenizer(),
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.0001,
            beta_end=0.02,
            prediction_type="v_prediction",
            clip_sample=False,
        ),
    )


PIPELINES = {
    "if-1": lambda: stage(diffusers.IFPipeline, SIMPLE, 1.5),
    "if-2": lambda: stage(
        diffusers.IFSuperResolutionPipeline,
        SECOND,
        1.0,
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    ),
    "upscaler": upscaler,
}
_PIPES = {}


@pytest.fixture
def pipes(request, tmp_path_factory):
    name = request.param
    if name not in _PIPES:
        folder = tmp_path_factory.mktemp(name)
        theirs = PIPELINES[name]()
        theirs.save_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        _PIPES[name] = theirs, first_devices(jaxdiff.load(folder, dtype="float32"), 1)
    return _PIPES[name]


def models(*names):
    return pytest.mark.parametrize("pipes", names, indirect=True)


@pytest.fixture
def draws(monkeypatch):
    """diffusers' noises: those at the start as listed, and in step i those of jaxdiff."""

    def patch(module, *starts):
        keys = per_sample_keys([SEED])
        left, steps = list(starts), iter(range(STEPS))

        def at_start(shape, *_, **__):
            z = left.pop(0)
            z = (
                np.asarray(step_noise(keys, z, _nhwc(shape), jnp.dtype("float32")))
                if (isinstance(z, int))
                else z
            )
            return nchw(z)

        def in_step(shape, *_, **__):
            z = step_noise(keys, next(steps), _nhwc(shape), jnp.dtype("float32"))
            return nchw(np.asarray(z))

        monkeypatch.setattr(f"diffusers.pipelines.{module}.randn_tensor", at_start)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", in_step)
        return left

    return patch


def _nhwc(shape):
    return shape[2], shape[3], shape[1]


def agree(got, want, start):
    reference = want.detach().numpy().transpose(0, 2, 3, 1)
    error = np.abs(got - reference).max() / np.abs(reference).max()
    assert error < LIMIT, error
    assert np.abs(reference - start).max() > 0.1


@pytest.mark.parametrize("scale", [1.0, 7.0])
@models("if-1")
def test_first_stage(pipes, draws, scale):
    """With the learned variance and dynamic thresholding of its scheduler."""
    theirs, ours = pipes
    noise = image((1, 8, 8, 3), seed=5)
    draws("deepfloyd_if.pipeline_if", noise)
    want = theirs(
        PROMPT.upper(),
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        output_type="pt",
        clean_caption=False,
    ).images
    got = ours(
        PROMPT.upper(),
        negative_prompt=NEGATIVE,
        steps=STEPS,
        guidance_scale=scale,
        latents=noise,
        seed=SEED,
        output="latent",
    )
    assert got.request.guidance.endswith("+threshold:percentile=0.95,max_limit=1.5")
    assert got.request.sampler == "ddpm:variance=learned_range"
    agree(got.images, want, noise)


@pytest.mark.parametrize("level", [None, 40])
@models("if-2")
def test_second_stage(pipes, draws, level):
    """From an image of half the side, whose noise is of a level that the network is told."""
    theirs, ours = pipes
    noise = image((1, 16, 16, 3), seed=5)
    low = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    left = draws("deepfloyd_if.pipeline_if_superresolution", noise, EXTRA_NOISE_STEP)
    levels = {} if level is None else {"noise_level": level}
    want = theirs(
        PROMPT,
        image=low,
        num_inference_steps=STEPS,
        output_type="pt",
        clean_caption=False,
        **levels,
    ).images
    assert not left
    got = ours(PROMPT, image=low, steps=STEPS, latents=noise, seed=SEED, output="latent", **levels)
    assert (got.request.height, got.request.guidance_scale) == (16, 4.0)
    agree(got.images, want, noise)


@models("upscaler")
def test_upscaler(pipes, draws):
    """Its latents have the size of the image."""
    theirs, ours = pipes
    noise = image((1, 8, 12, 4), seed=5)
    low = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8))
    draws("stable_diffusion.pipeline_stable_diffusion_upscale", EXTRA_NOISE_STEP)
    want = theirs(
        PROMPT,
        image=low,
        num_inference_steps=STEPS,
        noise_level=30,
        latents=nchw(noise),
        output_type="latent",
    ).images
    got = ours(
        PROMPT, image=low, steps=STEPS, latents=noise, seed=SEED, output="latent", noise_level=30
    )
    assert (got.request.height, got.request.width, got.request.guidance_scale) == (16, 24, 9.0)
    agree(got.images, want, noise)


@pytest.mark.parametrize("size", [(8, 8), (5, 12), (3, 1)])
def test_bilinear(size):
    rows = image((2, 4, 6, 3), seed=1)
    want = torch.nn.functional.interpolate(nchw(rows), size, mode="bilinear", align_corners=True)
    np.testing.assert_allclose(
        resize_bilinear(rows, size), want.numpy().transpose(0, 2, 3, 1), atol=1e-6
    )
