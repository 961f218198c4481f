"""Whole pipelines of Stable Diffusion 3 against diffusers, from the same start noise."""

import diffusers
import numpy as np
import pytest
import torch
from copier import image, nchw, randomise
from families import text_encoder, tokenizer
from safetensors.torch import save_file
from tiny import first_devices
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

import jaxdiff

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LIMIT = 1e-3  # relative error of the final latents
STEPS = 20
PROMPT, NEGATIVE = "abc de", "ij h"
CHANNELS, WIDTH = 16, 32
TRANSFORMER = {
    "sample_size": 8,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "attention_head_dim": 4,
    "num_attention_heads": 3,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 12,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 8,
}
SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
MODELS = ("sd3", "sd35-without-t5")


def t5():
    config = T5Config(
        vocab_size=40,
        d_model=WIDTH,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return randomise(T5EncoderModel(config), 6)


def pipeline(name):
    """A diffusers pipeline with small random parts; any tokenizer does for T5."""
    own, parts = ({}, {"text_encoder_3": t5(), "tokenizer_3": tokenizer("!")})
    if name == "deep":
        own = {"qk_norm": "rms_norm", "num_layers": 11}
    elif name == "sd35-without-t5":
        own, parts = SD35, {"text_encoder_3": None, "tokenizer_3": None}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=CHANNELS,
        scaling_factor=0.7,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=randomise(diffusers.SD3Transformer2DModel(**TRANSFORMER | own), 1),
        vae=randomise(vae, 2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=text_encoder(CLIPTextModelWithProjection, 3, hidden_act="quick_gelu"),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 4, hidden_act="gelu"),
        tokenizer_2=tokenizer("!"),
        **parts,
    )


_PIPES = {}


def both(name, tmp_path_factory):
    """The pipeline in diffusers and here, through a folder."""
    if name not in _PIPES:
        folder = tmp_path_factory.mktemp(name)
        theirs = pipeline(name)
        theirs.save_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        _PIPES[name] = theirs, first_devices(jaxdiff.load(folder, dtype="float32"), 1)
    return _PIPES[name]


def as_class(pipe, task):
    cls = getattr(diffusers, f"StableDiffusion3{task}Pipeline")
    made = cls(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(params=MODELS)
def pipes(request, tmp_path_factory):
    return both(request.param, tmp_path_factory)


@pytest.fixture
def sd3_noise(monkeypatch):
    """The start noise, which diffusers draws too; its VAE draws the mean of its latents."""
    noise = image((1, 8, 8, CHANNELS), seed=5)

    def draw(shape, *_, dtype=None, **__):
        assert tuple(shape) == (1, CHANNELS, 8, 8)
        return nchw(noise).to(dtype)

    for task in ("img2img", "inpaint"):
        name = f"stable_diffusion_3.pipeline_stable_diffusion_3_{task}"
        monkeypatch.setattr(f"diffusers.pipelines.{name}.randn_tensor", draw)
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.randn_tensor", lambda shape, **_: torch.zeros(shape)
    )
    return noise


def agree(got, want, start=0.0, limit=LIMIT):
    reference = want.detach().numpy().transpose(0, 2, 3, 1)
    error = np.abs(got - reference).max() / np.abs(reference).max()
    assert error < limit, error
    # The latents differ from where they began: something was generated.
    assert np.abs(reference - start).max() > 0.1


OURS = {"steps": STEPS, "output": "latent"}
THEIRS = {"num_inference_steps": STEPS, "output_type": "latent"}
THREE_STEPS = {"steps": 3, "guidance_scale": 1.0, "output": "latent"}


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 5.0},
        {"guidance_scale": 3.0, "negative_prompt": NEGATIVE},
    ],
    ids=["plain", "guided", "negative"],
)
def test_text_to_image(pipes, sd3_noise, options):
    theirs, ours = pipes
    want = theirs(PROMPT, latents=nchw(sd3_noise), **THEIRS, **options).images
    got = ours(PROMPT, latents=sd3_noise, **OURS, **options).images
    agree(got, want, sd3_noise)


# Each strength once, each way of guidance once: which goes with which changes nothing.
@pytest.mark.parametrize(
    ("strength", "options"),
    [
        (0.33, {"guidance_scale": 1.0}),
        (0.6, {"guidance_scale": 5.0}),
        (1.0, {"guidance_scale": 3.0, "negative_prompt": NEGATIVE}),
    ],
    ids=["plain", "guided", "negative"],
)
def test_image_to_image(pipes, sd3_noise, picture, options, strength):
    theirs, ours = pipes
    theirs = as_class(theirs, "Img2Img")
    shared = {"image": picture, "strength": strength, **options}
    want = theirs(PROMPT, height=16, width=16, **THEIRS, **shared).images
    agree(ours(PROMPT, latents=sd3_noise, **OURS, **shared).images, want)


@pytest.mark.parametrize(
    ("strength", "options"),
    [
        (0.33, {"guidance_scale": 3.0, "negative_prompt": NEGATIVE}),
        (1.0, {"guidance_scale": 1.0}),
    ],
    ids=["negative", "plain"],
)
def test_inpainting(pipes, sd3_noise, picture, mask, options, strength):
    theirs, ours = pipes
    theirs = as_class(theirs, "Inpaint")
    shared = {"image": picture, "strength": strength, **options}
    want = theirs(PROMPT, mask_image=mask, height=16, width=16, **THEIRS, **shared).images
    agree(ours(PROMPT, mask=mask, latents=sd3_noise, **OURS, **shared).images, want)


def test_defaults(pipes, sd3_noise):
    theirs, ours = pipes
    scale = ours.defaults.guidance_scale
    assert scale == (7.0 if ours.network.config.qk_norm is None else 4.5)
    assert (ours.defaults.steps, ours.defaults.height, ours.defaults.width) == (28, 16, 16)
    want = theirs(PROMPT, latents=nchw(sd3_noise), guidance_scale=scale, output_type="latent")
    agree(ours(PROMPT, latents=sd3_noise, output="latent").images, want.images, sd3_noise)


@pytest.mark.parametrize(
    "second",
    [
        {"prompt_2": "fgh a"},
        {"negative_prompt": NEGATIVE, "negative_prompt_2": "b ca"},
    ],
    ids=["prompt", "negative"],
)
def test_second_prompts(pipes, sd3_noise, second):
    theirs, ours = pipes
    second = {**second, "guidance_scale": 3.0}
    want = theirs(PROMPT, latents=nchw(sd3_noise), **THEIRS, **second).images
    agree(ours(PROMPT, latents=sd3_noise, **OURS, **second).images, want, sd3_noise)
    plain = ours(PROMPT, latents=sd3_noise, **OURS, guidance_scale=3.0).images
    assert np.abs(plain - want.numpy().transpose(0, 2, 3, 1)).max() > 1e-3


THIRD = {"prompt_3": "j ia", "negative_prompt": NEGATIVE, "negative_prompt_3": "c"}


def test_third_prompts(tmp_path_factory, sd3_noise):
    theirs, ours = both("sd3", tmp_path_factory)
    options = {"guidance_scale": 3.0}
    want = theirs(PROMPT, latents=nchw(sd3_noise), **THEIRS, **THIRD, **options).images
    agree(ours(PROMPT, latents=sd3_noise, **OURS, **THIRD, **options).images, want, sd3_noise)
    options["negative_prompt"] = NEGATIVE
    plain = ours(PROMPT, latents=sd3_noise, **OURS, **options).images
    assert np.abs(plain - want.numpy().transpose(0, 2, 3, 1)).max() > 1e-3


@pytest.mark.parametrize("length", [20, 300])
def test_lengths_of_texts(tmp_path_factory, sd3_noise, length):
    theirs, ours = both("sd3", tmp_path_factory)
    options = {"guidance_scale": 3.0, "max_sequence_length": length}
    want = theirs(PROMPT, latents=nchw(sd3_noise), **THEIRS, **options).images
    agree(ours(PROMPT, latents=sd3_noise, **OURS, **options).images, want, sd3_noise)
    plain = ours(PROMPT, latents=sd3_noise, **OURS, guidance_scale=3.0).images
    assert np.abs(plain - want.numpy().transpose(0, 2, 3, 1)).max() > 1e-3


def test_a_textual_inversion(tmp_path_factory, tmp_path, sd3_noise):
    """Of both CLIPs, and then of T5 too; without vectors of its own T5 reads the word as text."""
    _, ours = both("sd3", tmp_path_factory)
    theirs = pipeline("sd3")
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    widths = {"clip_l": ("", 12), "clip_g": ("_2", 12), "t5xxl": ("_3", WIDTH)}
    vectors = {n: torch.randn((2, w), generator=generator) for n, (_, w) in widths.items()}
    prompts = ["ab <x> c"] * 3
    before = other = ours(PROMPT, latents=sd3_noise, **THREE_STEPS).images
    for i, (name, (number, _)) in enumerate(widths.items()):
        tokens, encoder = (getattr(theirs, part + number) for part in ("tokenizer", "text_encoder"))
        tokens.add_tokens(["<x>", "<x>_1"])  # of the vocabulary that the embeddings have already
        first = tokens.convert_tokens_to_ids("<x>")
        with torch.no_grad():
            encoder.get_input_embeddings().weight[first : first + 2] = vectors[name]
        prompts[i] = "ab <x> <x>_1 c"
        if name == "clip_l":
            continue
        save_file({n: vectors[n] for n in list(widths)[: i + 1]}, tmp_path / "<x>.safetensors")
        assert ours.load_textual_inversion(tmp_path / "<x>.safetensors") == "<x>"
        texts = dict(zip(("prompt", "prompt_2", "prompt_3"), prompts, strict=True))
        options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
        want = theirs(latents=nchw(sd3_noise), **texts, **options).images
        got = ours("ab <x> c", latents=sd3_noise, **THREE_STEPS).images
        agree(got, want, sd3_noise, limit=1e-4)
        assert np.abs(got - other).max() > 1e-3
        other = got
        ours.unload_textual_inversions()
    np.testing.assert_array_equal(ours(PROMPT, latents=sd3_noise, **THREE_STEPS).images, before)


def test_clip_skip(pipes, sd3_noise):
    """diffusers skips no layers for the null stream, which is not there; T5 has none to skip."""
    theirs, ours = pipes
    options = {"guidance_scale": 1.0, "clip_skip": 1}
    want = theirs(PROMPT, latents=nchw(sd3_noise), **THEIRS, **options).images
    agree(ours(PROMPT, latents=sd3_noise, **OURS, **options).images, want, sd3_noise)


def test_saved_and_loaded_by_diffusers(pipes, sd3_noise, tmp_path):
    theirs, ours = pipes
    ours.save(tmp_path / "saved")
    absent = {name: None for name, part in theirs.components.items() if part is None}
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved", **absent)
    again.set_progress_bar_config(disable=True)
    for name, part in theirs.components.items():
        if isinstance(part, torch.nn.Module):
            before, after = part.state_dict(), getattr(again, name).state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)
    options = {"latents": nchw(sd3_noise), "num_inference_steps": 2, "output_type": "latent"}
    images = (pipe(PROMPT, **options).images for pipe in (again, theirs))
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_skip_layer_guidance(tmp_path_factory, sd3_noise):
    """In all steps; diffusers' interval is one of fractions of the steps."""
    theirs, ours = both("deep", tmp_path_factory)
    want = theirs(
        PROMPT,
        latents=nchw(sd3_noise),
        guidance_scale=3.0,
        skip_guidance_layers=[7, 8, 9],
        skip_layer_guidance_scale=2.8,
        skip_layer_guidance_start=-1,
        skip_layer_guidance_stop=2,
        **THEIRS,
    ).images
    options = {"latents": sd3_noise, "guidance_scale": 3.0, **OURS}
    agree(ours(PROMPT, guidance="pag:scale=2.8", **options).images, want, sd3_noise)
    plain = ours(PROMPT, **options).images
    assert np.abs(plain - want.numpy().transpose(0, 2, 3, 1)).max() > 1e-2


def test_images(pipes, sd3_noise):
    """Through the VAE and to bytes: nowhere more than one step of brightness apart."""
    theirs, ours = pipes
    want = theirs(
        PROMPT, num_inference_steps=4, latents=nchw(sd3_noise), output_type="np", guidance_scale=2.0
    ).images
    got = ours(PROMPT, steps=4, latents=sd3_noise, output="numpy", guidance_scale=2.0).images
    assert np.abs(got / 255 - want).max() < 1.01 / 255
