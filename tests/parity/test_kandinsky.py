"""Kandinsky against diffusers: prior and decoder as whole pipelines, from the same noises."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from copier import nchw, randomise
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from families import LENGTH, text_encoder, tokenizer
from PIL import Image
from tiny import first_devices

import jaxdiff
from jaxdiff.pipeline.cascade import Cascade
from jaxdiff.pipeline.image_encoder import image_embeddings, zero_image_embedding
from jaxdiff.samplers.base import INITIAL_NOISE_STEP, per_sample_keys, step_noise

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LIMIT = 1e-3  # relative error of the final latents
STEPS, SEED, WIDTH, STATES = 20, 7, 12, 10
PROMPT, NEGATIVE = "abc", "ij h"
SIZES = (20, 12, 3), (9, 31, 3)


def prior(cls=diffusers.KandinskyV22PriorPipeline):
    network = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=6,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=LENGTH,
        embedding_proj_dim=10,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return cls(
        prior=randomise(network, 1),
        image_encoder=randomise(transformers.CLIPVisionModelWithProjection(vision), 2),
        text_encoder=text_encoder(transformers.CLIPTextModelWithProjection, 3, eos_token_id=22),
        tokenizer=tokenizer("!"),
        scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            num_train_timesteps=1000,
            clip_sample=True,
            clip_sample_range=5.0,
        ),
        image_processor=transformers.CLIPImageProcessor(size=8, crop_size=8),
    )


UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "resnet_time_scale_shift": "scale_shift",
    "addition_embed_type": "image",
    "encoder_hid_dim": WIDTH,
    "encoder_hid_dim_type": "image_proj",
}
OF_TEXT = {
    "addition_embed_type": "text_image",
    "encoder_hid_dim": STATES,
    "encoder_hid_dim_type": "text_image_proj",
    "cross_attention_dim": WIDTH,
}
BETAS = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}
DDPM = diffusers.DDPMScheduler(**BETAS, clip_sample=False, variance_type="learned_range")
DDIM = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def unet(**fields):
    return randomise(diffusers.UNet2DConditionModel(**UNET | fields), 1)


def movq():
    made = diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=16,
        norm_num_groups=8,
        norm_type="spatial",
    )
    return randomise(made, 2)


def decoder(cls=diffusers.KandinskyV22Pipeline, **fields):
    return cls(unet=unet(**fields), movq=movq(), scheduler=DDPM)


def text_decoder(cls=diffusers.KandinskyPipeline, scheduler=DDIM, **fields):
    """Kandinsky 2.1's, which reads a text, too."""
    letters = ["\u2581", *"abcdefghij"]
    special = ("<s>", "<pad>", "</s>", "<unk>")
    scores = [(piece, 0.0) for piece in special]
    scores += [(piece, -float(i)) for i, piece in enumerate(letters)]
    config = MCLIPConfig(
        vocab_size=len(scores) + 1,  # and <mask>
        hidden_size=STATES,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=80,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        transformerDimSize=STATES,
        imageDimSize=WIDTH,
    )
    return cls(
        text_encoder=randomise(MultilingualCLIP(config), 3),
        tokenizer=transformers.XLMRobertaTokenizer(vocab=[*scores, ("<mask>", 0.0)]),
        unet=unet(**OF_TEXT | fields),
        movq=movq(),
        scheduler=scheduler,
    )


def pair(make, folder):
    theirs = make()
    theirs.save_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return theirs, first_devices(jaxdiff.load(folder, dtype="float32"), 1)


@pytest.fixture(scope="module")
def priors(tmp_path_factory):
    return pair(prior, tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    return pair(decoder, tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def first_versions(tmp_path_factory):
    """Prior and decoder of Kandinsky 2.1."""
    makes = {"prior": lambda: prior(diffusers.KandinskyPriorPipeline), "decoder": text_decoder}
    return [pair(make, tmp_path_factory.mktemp(name)) for name, make in makes.items()]


def noise(step, shape):
    return np.array(step_noise(per_sample_keys([SEED]), step, shape, jnp.dtype("float32")))


@pytest.fixture
def in_step(monkeypatch):
    """diffusers' noises of step i are those of jaxdiff, the same in all rows."""

    def patch(module, shape, first=0):
        steps = iter(range(first, STEPS))

        def draw(wanted, *_, **__):
            made = noise(next(steps), shape)
            made = torch.from_numpy(made) if len(shape) == 1 else nchw(made)
            return made.expand(wanted)

        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", draw)

    return patch


def close(got, want):
    want = want.detach().numpy()
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < LIMIT, error


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_embeddings_of_a_text(priors, in_step, scale):
    theirs, ours = priors
    in_step("scheduling_unclip", (WIDTH,))
    start = noise(INITIAL_NOISE_STEP, (WIDTH,))
    options = {"guidance_scale": scale, "num_inference_steps": STEPS}
    want = theirs(PROMPT, latents=torch.from_numpy(start), output_type="pt", **options)
    got = ours(PROMPT, seed=SEED, guidance_scale=scale, steps=STEPS)
    assert got.images.shape == (1, WIDTH)
    close(got.images, want.image_embeds)
    close(zero_image_embedding(ours), want.negative_image_embeds)


def test_embeddings_of_an_image(priors):
    """As diffusers' interpolation has them of images beside texts."""
    theirs, ours = priors
    rng = np.random.default_rng(2)
    pictures = [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in SIZES]
    for picture in pictures:
        pixels = theirs.image_processor(picture, return_tensors="pt").pixel_values
        with torch.no_grad():
            want = theirs.image_encoder(pixels).image_embeds
        close(image_embeddings(ours, picture), want)
    assert image_embeddings(ours, pictures).shape == (2, WIDTH)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_an_image_of_a_text(priors, decoders, in_step, negative):
    """Prior and decoder in one call; a negative prompt goes through the prior, too."""
    (their_prior, our_prior), (theirs, ours) = priors, decoders
    options = {"num_inference_steps": STEPS, "output_type": "pt"}
    in_step("scheduling_unclip", (WIDTH,))
    start = torch.from_numpy(noise(INITIAL_NOISE_STEP, (WIDTH,)))
    start = start if negative is None else start.expand(2, WIDTH)
    embeds = their_prior(PROMPT, negative, latents=start, **options)
    in_step("scheduling_ddpm", (8, 8, 4))
    want = theirs(
        embeds.image_embeds,
        embeds.negative_image_embeds,
        height=16,
        width=16,
        num_inference_steps=STEPS,
        latents=nchw(noise(INITIAL_NOISE_STEP, (8, 8, 4))),
        output_type="latent",
    ).images
    cascade = Cascade(our_prior, ours)
    settings = {"negative_prompt": negative, "steps": STEPS, "seed": SEED}
    stage = {"height": 16, "width": 16, "steps": STEPS}
    got = cascade(PROMPT, **settings, stage_options=[stage], output="latent")
    close(got.images.transpose(0, 3, 1, 2), want)
    images = ours.decode_latents(want.numpy().transpose(0, 2, 3, 1))
    with torch.no_grad():
        decoded = theirs.movq.decode(want, force_not_quantize=True).sample
    decoded = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().numpy().transpose(0, 2, 3, 1)
    assert np.abs(images.astype(int) - decoded).max() <= 1


@pytest.mark.parametrize(("negative", "scale"), [(None, 4.0), (NEGATIVE, 4.0), (None, 1.0)])
def test_an_image_of_a_text_by_the_first_version(first_versions, in_step, negative, scale):
    """Kandinsky 2.1: both stages have the prompts; the UNet sees the padding, too."""
    (their_prior, our_prior), (theirs, ours) = first_versions
    assert (our_prior.family.name, ours.family.name) == ("Kandinsky 2.1 prior", "Kandinsky 2.1")
    in_step("scheduling_unclip", (WIDTH,))
    start = torch.from_numpy(noise(INITIAL_NOISE_STEP, (WIDTH,)))
    start = start if negative is None else start.expand(2, WIDTH)
    options = {"num_inference_steps": STEPS}
    embeds = their_prior(PROMPT, negative, latents=start, output_type="pt", **options)
    want = []
    theirs(
        PROMPT,
        embeds.image_embeds,
        embeds.negative_image_embeds,
        negative,
        height=16,
        width=16,
        guidance_scale=scale,
        latents=nchw(noise(INITIAL_NOISE_STEP, (8, 8, 4))),
        callback=lambda _, __, latents: want.append(latents),
        **options,
    )
    stage = {"height": 16, "width": 16, "steps": STEPS, "guidance_scale": scale}
    cascade, settings = Cascade(our_prior, ours), {"negative_prompt": negative, "seed": SEED}
    got = cascade(PROMPT, steps=STEPS, **settings, stage_options=[stage], output="latent")
    close(got.images.transpose(0, 3, 1, 2), want[-1])


@pytest.fixture(scope="module")
def embeddings():
    """Of an image, and of another to be guided away from."""
    return np.random.default_rng(3).standard_normal((2, WIDTH), np.float32)


def picture():
    return Image.fromarray(np.random.default_rng(4).integers(0, 256, (16, 16, 3), np.uint8))


def as_class(pipe, cls):
    made = cls(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made


STRENGTHS = [0.3, 0.75]


@pytest.mark.parametrize("strength", STRENGTHS)
def test_an_image_of_an_image(decoders, in_step, embeddings, monkeypatch, strength):
    theirs, ours = decoders
    begun = nchw(noise(INITIAL_NOISE_STEP, (8, 8, 4)))
    module = diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_img2img
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: begun)
    in_step("scheduling_ddpm", (8, 8, 4), first=STEPS - int(strength * STEPS))
    want = as_class(theirs, diffusers.KandinskyV22Img2ImgPipeline)(
        torch.from_numpy(embeddings[:1]),
        picture(),
        torch.from_numpy(embeddings[1:]),
        strength=strength,
        height=16,
        width=16,
        num_inference_steps=STEPS,
        output_type="latent",
    ).images
    given = {"image_embeds": embeddings[0], "negative_image_embeds": embeddings[1]}
    options = {"image": picture(), "strength": strength, "steps": STEPS, "seed": SEED}
    got = ours("", **given, **options, output="latent")
    close(got.images.transpose(0, 3, 1, 2), want)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_an_image_of_an_image_by_the_first_version(
    first_versions, embeddings, monkeypatch, strength
):
    """Whose noise is not that of the first step."""
    theirs, ours = first_versions[1]
    begun = nchw(noise(INITIAL_NOISE_STEP, (8, 8, 4)))
    module = diffusers.pipelines.kandinsky.pipeline_kandinsky_img2img
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: begun)
    want = []
    as_class(theirs, diffusers.KandinskyImg2ImgPipeline)(
        PROMPT,
        picture(),
        torch.from_numpy(embeddings[:1]),
        torch.from_numpy(embeddings[1:]),
        strength=strength,
        height=16,
        width=16,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        callback=lambda _, __, latents: want.append(latents),
    )
    given = {"image_embeds": embeddings[0], "negative_image_embeds": embeddings[1]}
    options = {"image": picture(), "strength": strength, "steps": STEPS, "seed": SEED}
    got = ours(PROMPT, **given, **options, output="latent")
    close(got.images.transpose(0, 3, 1, 2), want[-1])


def hole():
    """A mask whose parts touch edges, and do not fill latents."""
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 6:11] = mask[15, 13:] = 255
    return Image.fromarray(mask)


def inpainted(pipe, embeddings, *prompt, **options):
    """diffusers' latents."""
    return pipe(
        *prompt,
        image=picture(),
        mask_image=hole(),
        image_embeds=torch.from_numpy(embeddings[:1]),
        negative_image_embeds=torch.from_numpy(embeddings[1:]),
        height=16,
        width=16,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        latents=nchw(noise(INITIAL_NOISE_STEP, (8, 8, 4))),
        **options,
    )


def test_inpainting(tmp_path, in_step, embeddings):
    """The sampler puts the known latents back after each step."""
    cls = diffusers.KandinskyV22InpaintPipeline
    theirs, ours = pair(lambda: decoder(cls, in_channels=9), tmp_path)
    in_step("scheduling_ddpm", (8, 8, 4))
    want = inpainted(theirs, embeddings, output_type="latent").images
    given = {"image_embeds": embeddings[0], "negative_image_embeds": embeddings[1]}
    options = {"image": picture(), "mask": hole(), "steps": STEPS, "seed": SEED}
    got = ours("", **given, **options, output="latent")
    close(got.images.transpose(0, 3, 1, 2), want)


def test_inpainting_by_the_first_version(tmp_path, embeddings):
    """The network alone keeps what is known."""
    cls = diffusers.KandinskyInpaintPipeline
    theirs, ours = pair(lambda: text_decoder(cls, in_channels=9), tmp_path)
    want = []
    inpainted(theirs, embeddings, PROMPT, callback=lambda _, __, latents: want.append(latents))
    given = {"image_embeds": embeddings[0], "negative_image_embeds": embeddings[1]}
    options = {"image": picture(), "mask": hole(), "steps": STEPS, "seed": SEED}
    got = ours(PROMPT, **given, **options, output="latent")
    close(got.images.transpose(0, 3, 1, 2), want[-1])


def test_an_image_of_depths(tmp_path, in_step, embeddings):
    """ControlNet's hint, of the resolution that the network's convolutions make latents of."""
    fields = {"addition_embed_type": "image_hint", "in_channels": 8}
    cls = diffusers.KandinskyV22ControlnetPipeline
    theirs, ours = pair(lambda: decoder(cls, **fields), tmp_path)
    depths = np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8)
    in_step("scheduling_ddpm", (8, 8, 4))
    want = []
    theirs(
        torch.from_numpy(embeddings[:1]),
        torch.from_numpy(embeddings[1:]),
        nchw(depths[None].astype(np.float32) / 255),
        height=16,
        width=16,
        num_inference_steps=STEPS,
        latents=nchw(noise(INITIAL_NOISE_STEP, (8, 8, 4))),
        callback=lambda _, __, latents: want.append(latents),
        output_type="pt",
    )
    given = {"image_embeds": embeddings[0], "negative_image_embeds": embeddings[1]}
    options = {"hint": depths, "height": 16, "width": 16, "steps": STEPS, "seed": SEED}
    got = ours("", **given, **options, output="latent")
    close(got.images.transpose(0, 3, 1, 2), want[-1])


def test_saved_folders_are_those_of_diffusers(first_versions, tmp_path):
    for theirs, ours in first_versions:
        ours.save(tmp_path / ours.name)
        again = type(theirs).from_pretrained(tmp_path / ours.name)
        for name, part in theirs.components.items():
            if isinstance(part, torch.nn.Module):
                for key, value in getattr(again, name).state_dict().items():
                    assert torch.equal(value, part.state_dict()[key]), (name, key)
