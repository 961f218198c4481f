"""Whole pipelines of FLUX.1 and Chroma against diffusers, from the same start noise."""

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
from jaxdiff.core.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed:FutureWarning"),
]

LIMIT = 1e-3  # relative error of the final latents
STEPS = 20
PROMPT, NEGATIVE = "abc de", "ij h"
HEIGHT, WIDTH = 16, 24
CHANNELS, STATES = 16, 24
TRANSFORMER = {
    "in_channels": 4 * CHANNELS,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": STATES,
    "axes_dims_rope": (4, 4, 4),
}
FLUX = {**TRANSFORMER, "pooled_projection_dim": 12, "guidance_embeds": True}
FILL = {**FLUX, "in_channels": 4 * (CHANNELS + CHANNELS + 2 * 2), "out_channels": 4 * CHANNELS}
CONTROL = {**FLUX, "in_channels": 4 * 2 * CHANNELS, "out_channels": 4 * CHANNELS}
CHROMA = {
    **TRANSFORMER,
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 20,
    "approximator_layers": 1,
}
SHIFTED = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
# Name -> class, transformer, scheduler.
MODELS = {
    "dev": (diffusers.FluxPipeline, FLUX, SHIFTED),
    "schnell": (
        diffusers.FluxPipeline,
        FLUX | {"guidance_embeds": False},
        diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
    ),
    "kontext": (diffusers.FluxKontextPipeline, FLUX, SHIFTED),
    "fill": (diffusers.FluxFillPipeline, FILL, SHIFTED),
    "control": (diffusers.FluxControlPipeline, CONTROL, SHIFTED),
    "chroma": (diffusers.ChromaPipeline, CHROMA, SHIFTED),
}
MODULES = (
    *(f"flux.pipeline_flux{task}" for task in ("", "_img2img", "_inpaint", "_fill", "_control")),
    *(f"flux.pipeline_flux_kontext{task}" for task in ("", "_inpaint")),
    *(f"chroma.pipeline_chroma{task}" for task in ("", "_img2img", "_inpainting")),
)


def t5(seed):
    config = transformers.T5Config(
        vocab_size=40,
        d_model=STATES,
        d_kv=6,
        d_ff=30,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return randomise(transformers.T5EncoderModel(config), seed)


def pipeline(name):
    """A diffusers pipeline with small random parts; both encoders have CLIP's kind of tokenizer."""
    cls, fields, scheduler = MODELS[name]
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=CHANNELS,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    parts = {"vae": randomise(vae, 2), "scheduler": scheduler}
    if name == "chroma":
        transformer = diffusers.ChromaTransformer2DModel(**fields)
        parts |= {"text_encoder": t5(4), "tokenizer": tokenizer("!")}
    else:
        transformer = diffusers.FluxTransformer2DModel(**fields)
        parts |= {"text_encoder": text_encoder(transformers.CLIPTextModel, 3)}
        parts |= {"tokenizer": tokenizer(), "text_encoder_2": t5(4)}
        parts |= {"tokenizer_2": tokenizer("!")}
    return cls(transformer=randomise(transformer, 1), **parts)


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


def as_class(pipe, cls):
    made = cls(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pipes(request, tmp_path_factory):
    return both(request.param, tmp_path_factory)


def models(*names):
    return pytest.mark.parametrize("pipes", names, indirect=True)


@pytest.fixture
def flux_noise(monkeypatch):
    """The start noise, which diffusers draws too; its VAE draws the mean of its latents."""
    noise = image((1, HEIGHT // 2, WIDTH // 2, CHANNELS), seed=5)

    def draw(shape, *_, dtype=None, **__):
        assert tuple(shape) == (1, CHANNELS, HEIGHT // 2, WIDTH // 2)
        return nchw(noise).to(dtype)

    for name in MODULES:
        monkeypatch.setattr(f"diffusers.pipelines.{name}.randn_tensor", draw)
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.randn_tensor", lambda shape, **_: torch.zeros(shape)
    )
    return noise


@pytest.fixture
def true_masks(monkeypatch):
    """Masks of Chroma's text as truth values: diffusers has numbers, which it adds to the scores.

    Its issue 12116 says so: 0 then hides nothing.
    """
    for task in ("", "Img2Img", "Inpaint"):
        cls = getattr(diffusers, f"Chroma{task}Pipeline")
        prepare = cls._prepare_attention_mask

        def truth_values(*args, prepare=prepare, **named):
            mask = prepare(*args, **named)  # none for a negative prompt without guidance
            return None if mask is None else mask.bool()

        monkeypatch.setattr(cls, "_prepare_attention_mask", truth_values)


@pytest.fixture
def wide():
    pixels = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def wide_mask():
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[3:11, 5:] = 255
    return Image.fromarray(pixels)


SIZE = {"height": HEIGHT, "width": WIDTH}
OURS = {"steps": STEPS, "output": "latent", **SIZE}
THEIRS = {"num_inference_steps": STEPS, "output_type": "latent", **SIZE}


def unpacked(tokens):
    return diffusers.FluxPipeline._unpack_latents(tokens, HEIGHT, WIDTH, 2)


def agree(got, want, start=0.0):
    reference = unpacked(want).detach().numpy().transpose(0, 2, 3, 1)
    error = np.abs(got - reference).max() / np.abs(reference).max()
    assert error < LIMIT, error
    # The latents differ from where they began: something was generated.
    assert np.abs(reference - start).max() > 0.1


# diffusers' options, and ours
DISTILLED = ({"guidance_scale": 2.5}, {"guidance_scale": 2.5})
TRUE = (
    {"guidance_scale": 2.5, "true_cfg_scale": 3.0, "negative_prompt": NEGATIVE},
    {
        "distilled_guidance_scale": 2.5,
        "guidance": "cfg",
        "guidance_scale": 3.0,
        "negative_prompt": NEGATIVE,
    },
)
GUIDANCE = pytest.mark.parametrize(
    ("theirs_of", "ours_of"), [DISTILLED, TRUE], ids=["distilled", "true"]
)
SECOND = {"prompt_2": "fgh a"}


@GUIDANCE
@models("dev", "kontext")
def test_text_to_image(pipes, flux_noise, theirs_of, ours_of):
    theirs, ours = pipes
    area = {"max_area": HEIGHT * WIDTH} if "Kontext" in type(theirs).__name__ else {}
    want = theirs(prompt=PROMPT, **THEIRS, **SECOND, **theirs_of, **area).images
    got = ours(PROMPT, latents=flux_noise, **OURS, **SECOND, **ours_of).images
    agree(got, want, flux_noise)


@pytest.mark.parametrize("length", [20, 512])
@models("schnell")
def test_lengths_of_texts(pipes, flux_noise, length):
    theirs, ours = pipes
    options = {**THEIRS, "num_inference_steps": 4, "max_sequence_length": length}
    want = theirs(PROMPT, guidance_scale=0.0, **options).images
    assert ours.family.text_encoders[1].length == 256
    short = {**SIZE, "output": "latent", "latents": flux_noise}
    agree(ours(PROMPT, max_sequence_length=length, **short).images, want, flux_noise)
    with pytest.raises(InputError, match="max_sequence_length: got 513, expected a number"):
        ours.resolve(PROMPT, max_sequence_length=513)
    with pytest.raises(InputError, match=r"clip_skip: got 1, expected none for FLUX\.1 schnell"):
        ours.resolve(PROMPT, clip_skip=1)


@models("schnell")
def test_few_steps(pipes, flux_noise):
    theirs, ours = pipes
    options = {**THEIRS, "num_inference_steps": 4, "max_sequence_length": 256}
    want = theirs(PROMPT, guidance_scale=0.0, **options).images
    assert (ours.defaults.steps, ours.defaults.guidance) == (4, "none")
    got = ours(PROMPT, latents=flux_noise, output="latent", **SIZE).images
    agree(got, want, flux_noise)


# Each strength once, each way of guidance once: which goes with which changes nothing.
@pytest.mark.parametrize(
    ("strength", "theirs_of", "ours_of"),
    [(0.33, *TRUE), (1.0, *DISTILLED)],
    ids=["true", "distilled"],
)
@models("dev")
def test_image_to_image(pipes, flux_noise, wide, strength, theirs_of, ours_of):
    theirs, ours = pipes
    theirs = as_class(theirs, diffusers.FluxImg2ImgPipeline)
    shared = {"image": wide, "strength": strength}
    want = theirs(PROMPT, **THEIRS, **shared, **theirs_of).images
    agree(ours(PROMPT, latents=flux_noise, **OURS, **shared, **ours_of).images, want)


@pytest.mark.parametrize("strength", [0.33, 1.0])
@models("dev")
def test_inpainting(pipes, flux_noise, wide, wide_mask, strength):
    theirs, ours = pipes
    theirs = as_class(theirs, diffusers.FluxInpaintPipeline)
    shared = {"image": wide, "strength": strength, "guidance_scale": 2.5}
    want = theirs(PROMPT, mask_image=wide_mask, **THEIRS, **shared).images
    got = ours(PROMPT, mask=wide_mask, latents=flux_noise, **OURS, **shared).images
    agree(got, want)


@pytest.mark.parametrize("strength", [0.33, None])
@models("fill")
def test_fill(pipes, flux_noise, wide, wide_mask, strength):
    theirs, ours = pipes
    shared = {"image": wide, "guidance_scale": 2.5}
    known = {} if strength is None else {"strength": strength}
    want = theirs(PROMPT, mask_image=wide_mask, **THEIRS, **shared, **known).images
    got = ours(PROMPT, mask=wide_mask, latents=flux_noise, **OURS, **shared, **known).images
    agree(got, want)
    assert (ours.defaults.steps, ours.defaults.guidance_scale) == (50, 30.0)


@GUIDANCE
@models("kontext")
def test_editing(pipes, flux_noise, wide, theirs_of, ours_of):
    theirs, ours = pipes
    area = {"max_area": HEIGHT * WIDTH, "_auto_resize": False}
    want = theirs(prompt=PROMPT, image=wide, **THEIRS, **theirs_of, **area).images
    got = ours(PROMPT, image=wide, latents=flux_noise, **OURS, **ours_of)
    agree(got.images, want, flux_noise)
    assert got.request.strength == 1.0
    # Of the image's latents too.
    mean, _ = ours.vae.encode(jnp.asarray(wide, jnp.float32)[None] / 127.5 - 1)
    latents = np.asarray(ours.vae.scale(mean))
    again = ours(PROMPT, image=latents, latents=flux_noise, **OURS, **ours_of).images
    agree(again, want, flux_noise)


@pytest.mark.parametrize("strength", [0.33, 1.0])
@GUIDANCE
@models("kontext")
def test_editing_under_a_mask(pipes, flux_noise, wide, wide_mask, strength, theirs_of, ours_of):
    theirs, ours = pipes
    theirs = as_class(theirs, diffusers.FluxKontextInpaintPipeline)
    shared = {"image": wide, "strength": strength}
    known = {"max_area": HEIGHT * WIDTH, "_auto_resize": False}
    want = theirs(prompt=PROMPT, mask_image=wide_mask, **THEIRS, **shared, **theirs_of, **known)
    got = ours(PROMPT, mask=wide_mask, latents=flux_noise, **OURS, **shared, **ours_of)
    agree(got.images, want.images)


@models("control")
def test_control_images(pipes, flux_noise, wide):
    theirs, ours = pipes
    want = theirs(PROMPT, control_image=wide, guidance_scale=2.5, **THEIRS).images
    got = ours(PROMPT, image=wide, latents=flux_noise, guidance_scale=2.5, **OURS)
    agree(got.images, want, flux_noise)
    assert got.request.strength == 1.0
    assert (ours.defaults.steps, ours.defaults.guidance_scale) == (50, 10.0)
    other = ours(PROMPT, image=wide.rotate(180), latents=flux_noise, guidance_scale=2.5, **OURS)
    assert np.abs(other.images - got.images).max() > 0.1


PLAIN = {"guidance_scale": 1.0}
GUIDED = {"guidance_scale": 4.0, "negative_prompt": NEGATIVE}


@pytest.mark.parametrize("options", [PLAIN, GUIDED], ids=["plain", "negative"])
@models("chroma")
def test_chroma(pipes, flux_noise, true_masks, options):
    theirs, ours = pipes
    want = theirs(PROMPT, **THEIRS, **options).images
    got = ours(PROMPT, latents=flux_noise, **OURS, **options).images
    agree(got, want, flux_noise)


@pytest.mark.parametrize(
    ("strength", "options"), [(0.33, GUIDED), (1.0, PLAIN)], ids=["negative", "plain"]
)
@models("chroma")
def test_chroma_image_to_image(pipes, flux_noise, true_masks, wide, options, strength):
    theirs, ours = pipes
    theirs = as_class(theirs, diffusers.ChromaImg2ImgPipeline)
    shared = {"image": wide, "strength": strength, **options}
    want = theirs(PROMPT, **THEIRS, **shared).images
    agree(ours(PROMPT, latents=flux_noise, **OURS, **shared).images, want)


@models("dev", "chroma")
def test_images(pipes, flux_noise, true_masks):
    """Through the VAE and to bytes: nowhere more than one step of brightness apart."""
    theirs, ours = pipes
    want = theirs(PROMPT, num_inference_steps=4, output_type="np", guidance_scale=2.0, **SIZE)
    got = ours(PROMPT, steps=4, latents=flux_noise, output="numpy", guidance_scale=2.0, **SIZE)
    assert np.abs(got.images / 255 - want.images).max() < 1.01 / 255


@models("dev", "schnell", "kontext", "fill", "control", "chroma")
def test_saved_and_loaded_again(pipes, tmp_path):
    theirs, ours = pipes
    ours.save(tmp_path / "saved")
    again = type(theirs).from_pretrained(tmp_path / "saved")
    for name, module in theirs.components.items():
        if isinstance(module, torch.nn.Module):
            tensors = getattr(again, name).state_dict()
            assert all(torch.equal(tensors[key], t) for key, t in module.state_dict().items())
    configs = [dict(each.scheduler.config) for each in (again, theirs)]
    for config in configs:
        config.pop("_use_default_values", None)  # which of them a file did not name
    assert configs[0] == configs[1]
    assert jaxdiff.load(tmp_path / "saved", dtype="float32").family == ours.family


@models("dev")
def test_requests_that_it_refuses(pipes):
    _, ours = pipes
    with pytest.raises(InputError, match="height: got 18, expected a multiple of 4"):
        ours.resolve(PROMPT, height=18)
    with pytest.raises(InputError, match=r"distilled_guidance_scale: got 2\.0 with guidance none"):
        ours.resolve(PROMPT, distilled_guidance_scale=2.0)
