"""Latent diffusion's text-to-image pipeline against diffusers, from the same start noise.

diffusers has no image-to-image pipeline of it. Those of Stable Diffusion are the same with the
embeddings of its text encoder.
"""

import json

import diffusers
import numpy as np
import pytest
import torch
from copier import image, nchw, randomise
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from families import BETAS
from PIL import Image
from tiny import first_devices
from transformers import BertTokenizer

import jaxdiff
from jaxdiff.checkpoints.pipelines import read_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.families.detection import family_of

LIMIT = 1e-3  # relative error of the final latents
STEPS = 20
PROMPT, NEGATIVE, SIZE = "a red, reddish cat", "a red dog", 64
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", ",", "##s", "##dish"]
SAMPLERS = {"ddim": DDIMScheduler, "pndm": diffusers.PNDMScheduler}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=SIZE // 8,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        scaling_factor=0.3,
    )
    bert = LDMBertConfig(
        vocab_size=len(WORDS),
        encoder_layers=2,
        encoder_ffn_dim=20,
        encoder_attention_heads=2,
        head_dim=5,
        d_model=12,
    )
    made = diffusers.LDMTextToImagePipeline(
        vqvae=randomise(vae, 1),
        bert=randomise(LDMBertModel(bert), 2),
        tokenizer=BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}),
        unet=randomise(unet, 3),
        scheduler=DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
    )
    path = tmp_path_factory.mktemp("ldm")
    made.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    pipe = diffusers.LDMTextToImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(folder):
    return first_devices(jaxdiff.load(folder, dtype="float32"), 1)


@pytest.fixture
def start():
    return image((1, 8, 8, 4), seed=5)


@pytest.fixture
def no_draws(monkeypatch, start):
    """The start noise of Stable Diffusion's pipelines; the VAE draws the mean of its latents."""
    for name in ("img2img", "inpaint"):
        monkeypatch.setattr(
            f"diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_{name}.randn_tensor",
            lambda shape, *_, **__: nchw(start),
        )
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.randn_tensor", lambda shape, **_: torch.zeros(shape)
    )


def agree(got, want, start=0.0):
    reference = want.detach().numpy().transpose(0, 2, 3, 1)
    error = np.abs(got - reference).max() / np.abs(reference).max()
    assert error < LIMIT, error
    assert np.abs(reference - start).max() > 0.1


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_to_image(theirs, ours, start, monkeypatch, sampler, scale):
    decoded = []
    decode = theirs.vqvae.decode
    monkeypatch.setattr(theirs.vqvae, "decode", lambda z: decoded.append(z) or decode(z))
    options = {"skip_prk_steps": True} if sampler == "pndm" else {}
    scheduler = SAMPLERS[sampler].from_config(theirs.scheduler.config, **options)
    monkeypatch.setattr(theirs, "scheduler", scheduler)
    pixels = theirs(
        [PROMPT],
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=nchw(start),
        output_type="np",
    ).images
    shared = {"steps": STEPS, "guidance_scale": scale, "sampler": sampler, "latents": start}
    agree(ours(PROMPT, output="latent", **shared).images, decoded[0] * 0.3, start)
    got = ours(PROMPT, output="numpy", **shared).images
    assert np.abs(got / 255 - pixels).max() < 1 / 255  # bytes


def embeddings(theirs, *texts):
    tokens = theirs.tokenizer(
        list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return theirs.bert(tokens.input_ids)[0].chunk(len(texts))


@pytest.mark.usefixtures("no_draws")
@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_from_an_image(theirs, ours, start, task):
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[16:48, 24:] = 255
    masks = {"mask_image": Image.fromarray(mask)} if task == "Inpaint" else {}
    sized = {"height": SIZE, "width": SIZE} if masks else {}
    parts = {"vae": theirs.vqvae, "unet": theirs.unet, "scheduler": theirs.scheduler}
    absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    made = getattr(diffusers, f"StableDiffusion{task}Pipeline")(
        **parts, **dict.fromkeys(absent), requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    prompt, negative = embeddings(theirs, PROMPT, NEGATIVE)
    want = made(
        image=picture,
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        strength=0.7,
        guidance_scale=4.0,
        num_inference_steps=STEPS,
        output_type="latent",
        **masks,
        **sized,
    ).images
    got = ours(
        PROMPT,
        negative_prompt=NEGATIVE,
        image=picture,
        mask=masks.get("mask_image"),
        strength=0.7,
        guidance_scale=4.0,
        sampler="ddim",
        steps=STEPS,
        latents=start,
        output="latent",
    )
    agree(got.images, want)


def test_folders_go_both_ways(theirs, ours, folder, tmp_path):
    ours.save(tmp_path / "again")
    index = json.loads((tmp_path / "again/model_index.json").read_text())
    assert index["bert"] == ["latent_diffusion", "LDMBertModel"]
    again = diffusers.LDMTextToImagePipeline.from_pretrained(tmp_path / "again")
    for name in ("vqvae", "bert", "unet"):
        own, other = (getattr(pipe, name).state_dict() for pipe in (theirs, again))
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own)
    assert again.tokenizer(PROMPT)["input_ids"] == theirs.tokenizer(PROMPT)["input_ids"]


def test_another_vae_takes_the_place_of_vqvae(folder, ours, start):
    pipe = first_devices(jaxdiff.load(folder, dtype="float32", vae=folder), 1)
    assert pipe.codec is not ours.codec
    options = {"steps": 2, "latents": start, "output": "numpy"}
    np.testing.assert_array_equal(pipe("a", **options).images, ours("a", **options).images)


def test_refusals(folder):
    parts = read_pipeline(folder)
    for name in ("unet", "vqvae", "bert"):
        fewer = {k: v for k, v in parts.components.items() if k != name}
        with pytest.raises(InputError, match=f"here: {name}: got none, expected"):
            family_of(
                type(parts)(**{**vars(parts), "components": fewer}),
                "here",
            )
