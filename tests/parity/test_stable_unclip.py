"""Stable unCLIP against diffusers: variations of images, and images of texts by a prior."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from copier import nchw, randomise
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from families import DDIM, LENGTH, V2, text_encoder, tokenizer
from PIL import Image
from tiny import first_devices

import jaxdiff
from jaxdiff.pipeline.cascade import Cascade
from jaxdiff.samplers.base import (
    EXTRA_NOISE_STEP,
    INITIAL_NOISE_STEP,
    per_sample_keys,
    step_noise,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LIMIT = 1e-3  # relative error of the final latents
STEPS, SEED, WIDTH = 20, 7, 12
PROMPT, NEGATIVE = "abc", "ij h"
SIZE = {"height": 16, "width": 16}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def decoder_parts():
    unet = diffusers.UNet2DConditionModel(
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * WIDTH,
        **V2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.3,
    )
    normaliser = randomise(StableUnCLIPImageNormalizer(WIDTH), 4)
    with torch.no_grad():
        normaliser.std.abs_().add_(0.5)
    return {
        "unet": randomise(unet, 1),
        "vae": randomise(vae, 2),
        "text_encoder": text_encoder(transformers.CLIPTextModel, 3, hidden_act="gelu"),
        "tokenizer": tokenizer("!"),
        "image_normalizer": normaliser,
        "image_noising_scheduler": diffusers.DDPMScheduler(**COSINE),
        "scheduler": diffusers.DDIMScheduler.from_config(
            DDIM.config, prediction_type="v_prediction"
        ),
    }


def variations():
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return diffusers.StableUnCLIPImg2ImgPipeline(
        **decoder_parts(),
        image_encoder=randomise(transformers.CLIPVisionModelWithProjection(vision), 5),
        feature_extractor=transformers.CLIPImageProcessor(size=8, crop_size=8),
    )


def with_prior():
    network = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=6,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=LENGTH,
        embedding_proj_dim=10,
    )
    return diffusers.StableUnCLIPPipeline(
        **decoder_parts(),
        prior=randomise(network, 6),
        prior_text_encoder=text_encoder(
            transformers.CLIPTextModelWithProjection, 7, eos_token_id=22
        ),
        prior_tokenizer=tokenizer("!"),
        prior_scheduler=diffusers.DDPMScheduler(
            **COSINE,
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=5.0,
        ),
    )


def pair(make, folder):
    theirs = make()
    theirs.save_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return theirs, jaxdiff.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def varying(tmp_path_factory):
    theirs, ours = pair(variations, tmp_path_factory.mktemp("variations"))
    return theirs, first_devices(ours, 1)


def noise(step, shape):
    return np.array(step_noise(per_sample_keys([SEED]), step, shape, jnp.dtype("float32")))


@pytest.fixture
def noised(monkeypatch):
    """The noise that diffusers adds to embeddings is jaxdiff's."""

    def patch(module):
        made = torch.from_numpy(noise(EXTRA_NOISE_STEP, (WIDTH,)))
        name = f"diffusers.pipelines.stable_diffusion.{module}.randn_tensor"
        monkeypatch.setattr(name, lambda *_, **__: made)

    return patch


def start():
    return nchw(noise(INITIAL_NOISE_STEP, (8, 8, 4)))


def close(got, want):
    want = want.detach().numpy()
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < LIMIT, error


def picture():
    pixels = np.random.default_rng(2).integers(0, 256, (20, 12, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("scale", "level", "negative"), [(1.0, 0, None), (10.0, 0, None), (10.0, 300, NEGATIVE)]
)
def test_variation_of_an_image(varying, noised, scale, level, negative):
    theirs, ours = varying
    noised("pipeline_stable_unclip_img2img")
    options = {**SIZE, "guidance_scale": scale, "noise_level": level, "negative_prompt": negative}
    want = theirs(
        picture(),
        PROMPT,
        num_inference_steps=STEPS,
        latents=start(),
        output_type="latent",
        **options,
    ).images
    got = ours(PROMPT, image=picture(), seed=SEED, steps=STEPS, output="latent", **options)
    close(got.images.transpose(0, 3, 1, 2), want)


def test_image_of_an_embedding(varying, noised):
    theirs, ours = varying
    noised("pipeline_stable_unclip_img2img")
    embedding = noise(3, (WIDTH,))
    want = theirs(
        prompt=PROMPT,
        image_embeds=torch.from_numpy(embedding),
        noise_level=999,
        num_inference_steps=STEPS,
        latents=start(),
        output_type="latent",
        **SIZE,
    ).images
    options = {"image_embeds": embedding, "noise_level": 999, **SIZE}
    got = ours(PROMPT, seed=SEED, output="latent", **options)
    assert got.request.steps == STEPS
    close(got.images.transpose(0, 3, 1, 2), want)


def test_image_of_a_text(noised, tmp_path, monkeypatch):
    """The prior and the decoder in one folder; its scheduler is diffusers' DDPM."""
    theirs, ours = pair(with_prior, tmp_path)
    ours = Cascade(*(first_devices(pipe, 1) for pipe in ours.pipes))
    noised("pipeline_stable_unclip")
    steps = iter(range(STEPS))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *_, **__: torch.from_numpy(noise(next(steps), (WIDTH,))),
    )
    want = theirs(
        PROMPT,
        prior_num_inference_steps=STEPS,
        num_inference_steps=STEPS,
        prior_latents=torch.from_numpy(noise(INITIAL_NOISE_STEP, (WIDTH,))),
        latents=start(),
        noise_level=50,
        output_type="latent",
        **SIZE,
    ).images
    own = {"noise_level": 50, **SIZE}
    got = ours(PROMPT, seed=SEED, steps=STEPS, stage_options=[own], output="latent")
    close(got.images.transpose(0, 3, 1, 2), want)
