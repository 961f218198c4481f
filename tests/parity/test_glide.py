"""GLIDE against its own PyTorch network: modules, files, and whole pipelines of both stages.

diffusers has no GLIDE. `glide_reference` has the tensors of the published network, by name and
shape.
"""

import gzip
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, image, nchw, randomise
from glide_files import LENGTH, MERGES, vocabulary, write_vocabulary
from glide_reference import ClipImage, ClipText, ClipTower, Glide, sample
from PIL import Image
from tiny import first_devices
from transformers import GPT2Tokenizer

import jaxdiff
from jaxdiff.checkpoints.clip_vision import MEAN, STD
from jaxdiff.checkpoints.clip_vocabulary import clip_tokenizer
from jaxdiff.checkpoints.glide_clip import read_glide_clip
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.checkpoints.safetensors import read_table, read_tensor
from jaxdiff.checkpoints.single_file import write_single_file
from jaxdiff.data.tokenizer import tokenize
from jaxdiff.families.low_resolution import resize_bilinear
from jaxdiff.pipeline.tokenizers import tokenizer_of
from jaxdiff.samplers.base import per_sample_keys, step_noise

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LIMIT = 1e-3  # relative error of the final images
STEPS, SEED, SIDE, BIG = 20, 7, 8, 16
PROMPT = "A red Cat"
END = len(vocabulary()) - 1
SMALL = {
    "width": 32,
    "multiples": (1, 4),
    "attends": (False, True),
    "layers": 2,
    "words": len(vocabulary()),
    "length": LENGTH,
    "text_width": 128,
    "text_layers": 2,
}
CHANNELS = {"base": 3, "base_inpaint": 7, "upsample": 6, "upsample_inpaint": 10}
TABLE = pathlib.Path(__file__).parents[1] / "checkpoints/original/glide.json.gz"
DEEP = {"multiples": (1, 1, 2, 2, 4, 4), "attends": (False,) * 3 + (True,) * 3, "layers": 2}


@pytest.mark.parametrize("name", CHANNELS)
def test_the_reference_has_the_published_tensors(name):
    shapes = json.loads(gzip.decompress(TABLE.read_bytes()))[name]
    form = DEEP if name.startswith("upsample") else {}
    with torch.device("meta"):
        made = Glide(in_channels=CHANNELS[name], **form)
    assert {key: list(value.shape) for key, value in made.state_dict().items()} == shapes


_MADE = {}


def models(*names):
    return pytest.mark.parametrize("pair", names, indirect=True)


@pytest.fixture
def pair(request, tmp_path_factory):
    """The reference and the pipeline of its file."""
    name = request.param
    if name not in _MADE:
        theirs = randomise(Glide(in_channels=CHANNELS[name], **SMALL), seed=3)
        folder = write_vocabulary(tmp_path_factory.mktemp(name))
        torch.save(theirs.state_dict(), folder / f"{name}.pt")
        pipe = first_devices(jaxdiff.load(folder / f"{name}.pt", "float32"), 1)
        _MADE[name] = theirs, pipe, folder / f"{name}.pt"
    return _MADE[name][:2]


def ids(*texts):
    """Tokens of texts as the original code pads them."""
    merges = [tuple(merge.split()) for merge in MERGES]
    made = GPT2Tokenizer(vocab=vocabulary(), merges=merges)
    rows = [made(text.lower())["input_ids"][:LENGTH] for text in texts]
    return np.array([row + [END] * (LENGTH - len(row)) for row in rows])


@models("base")
def test_text_encoder(pair):
    theirs, ours = pair
    rows = ids(PROMPT, "", "a" * 40)
    assert (rows[0] == END).sum() == LENGTH - 3
    assert (rows[1] == END).all()
    assert (rows[2] != END).all()
    with torch.no_grad():
        states, pooled = theirs.encode(torch.from_numpy(rows))
    features = ours.text_encoder.features(jnp.asarray(rows))
    agree(features.last, states)
    assert features.pooled is not None
    agree(features.pooled, pooled)


@models(*CHANNELS)
def test_network(pair):
    """With all of its channels, in the order of the original code."""
    theirs, ours = pair
    x, known, low = image((2, SIDE, SIDE, 3)), image((2, SIDE, SIDE, 3), 2), image((2, 4, 4, 3), 3)
    mask = np.zeros((2, SIDE, SIDE, 1), np.float32)
    mask[:, 2:] = 1
    rows = ids(PROMPT, "cat")
    channels = {
        3: [],
        7: [known * mask, mask],
        6: [resize_bilinear(low, (SIDE, SIDE), align_corners=False)],
    }
    channels[10] = channels[7] + channels[6]
    count = theirs.in_channels
    with torch.no_grad():
        arrays = [nchw(each) for each in (known, mask, low)]
        want = theirs(nchw(x), torch.tensor([3, 801]), torch.from_numpy(rows), *arrays)
    features = ours.text_encoder.features(jnp.asarray(rows))
    got = ours.unet(
        jnp.asarray(np.concatenate([x, *channels[count]], axis=-1)),
        jnp.array([3, 801]),
        features.last,
        class_labels=features.pooled,
    )
    agree(got, want)


@pytest.mark.parametrize("size", [(16, 8), (3, 9)])
def test_bilinear(size):
    rows = image((2, 4, 6, 3))
    want = torch.nn.functional.interpolate(nchw(rows), size, mode="bilinear", align_corners=False)
    got = resize_bilinear(rows, size, align_corners=False)
    np.testing.assert_allclose(got, want.numpy().transpose(0, 2, 3, 1), atol=1e-6)


def predict(network, scale, **inputs):
    """Guided noise, and the mix of variances that the text alone asks for."""
    texts = torch.from_numpy(ids(PROMPT, ""))

    def outputs(x, t):
        cond, null = (
            network(x, t, texts[i : i + 1].expand(len(x), -1), **inputs).chunk(2, dim=1)
            for i in (0, 1)
        )
        return torch.cat([null[0] + scale * (cond[0] - null[0]), cond[1]], dim=1)

    return outputs


def draw(side):
    """The noises of our steps."""
    keys = per_sample_keys([SEED])

    def at(step):
        return nchw(np.asarray(step_noise(keys, step, (side, side, 3), jnp.dtype("float32"))))

    return at


def compare(got, want, start):
    reference = want.numpy().transpose(0, 2, 3, 1)
    assert np.abs(got - reference).max() / np.abs(reference).max() < LIMIT
    assert np.abs(reference - start).max() > 0.1


@pytest.mark.parametrize("scale", [None, 1.0])
@models("base", "base_inpaint")
def test_base(pair, scale):
    """Ancestral sampling with the learned variance; one for inpainting works without a mask."""
    theirs, ours = pair
    noise = image((1, SIDE, SIDE, 3), 5)
    guided = predict(theirs, 3.0 if scale is None else scale)
    want = sample(guided, nchw(noise), "cosine", STEPS, draw=draw(SIDE))
    got = ours(
        PROMPT,
        guidance_scale=scale,
        steps=STEPS,
        height=SIDE,
        width=SIDE,
        latents=noise,
        seed=SEED,
        output="latent",
    )
    assert got.request.sampler == "ddpm:variance=learned_range"
    assert got.request.guidance.endswith("+clip-sample:limit=1.0")
    compare(got.images, want, noise)


@pytest.mark.parametrize("scale", [None, 2.0])
@models("upsample", "upsample_inpaint")
def test_upsampler(pair, scale):
    """DDIM, from an image of half the side, without guidance unless it is asked for."""
    theirs, ours = pair
    noise = image((1, BIG, BIG, 3), 5)
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    low = nchw(pixels[None].astype(np.float32) / 127.5 - 1)
    guided = predict(theirs, 1.0 if scale is None else scale, low=low)
    want = sample(guided, nchw(noise), "linear", STEPS)
    got = ours(
        PROMPT,
        image=Image.fromarray(pixels),
        guidance_scale=scale,
        steps=STEPS,
        height=BIG,
        width=BIG,
        latents=noise,
        seed=SEED,
        output="latent",
    )
    assert got.request.sampler == "ddim"
    compare(got.images, want, noise)


@pytest.mark.parametrize("side", [SIDE, BIG])
@models("base_inpaint", "upsample_inpaint")
def test_inpainting(pair, side):
    """The network sees what is known, and it is put back after each step."""
    theirs, ours = pair
    upsamples = theirs.in_channels == 10
    rng, noise = np.random.default_rng(0), image((1, side, side, 3), 5)
    pixels, small = (rng.integers(0, 256, (n, n, 3), np.uint8) for n in (side, SIDE))
    known, low = (nchw(each[None].astype(np.float32) / 127.5 - 1) for each in (pixels, small))
    painted = np.zeros((side, side), np.uint8)
    painted[:4, 2:] = 255
    mask = torch.from_numpy(1 - painted / 255).float()[None, None]
    inputs = {"image": known, "mask": mask} | ({"low": low} if upsamples else {})
    z = nchw(noise)
    want = sample(
        predict(theirs, 3.0, **inputs),
        z,
        "linear" if upsamples else "cosine",
        STEPS,
        draw=None if upsamples else draw(side),
        known=(known, mask, z),
    )
    images = {"image": small, "original_image": pixels} if upsamples else {"image": pixels}
    got = ours(
        PROMPT,
        **images,
        mask=painted,
        guidance_scale=3.0,
        steps=STEPS,
        latents=noise,
        seed=SEED,
        output="latent",
    )
    assert got.images.shape == noise.shape
    compare(got.images, want, noise)


@models(*CHANNELS)
def test_files_go_both_ways(pair, tmp_path):
    """From the file to a folder and back: the tensors are those of PyTorch."""
    theirs = pair[0]
    (path,) = (path for made, _, path in _MADE.values() if made is theirs)
    write_pipeline(tmp_path / "folder", read_model(path))
    write_single_file(tmp_path / "again.safetensors", read_model(tmp_path / "folder"))
    found = read_table(tmp_path / "again.safetensors")
    wanted = theirs.state_dict()
    assert found.keys() == wanted.keys()
    for name, entry in found.items():
        np.testing.assert_array_equal(read_tensor(entry), wanted[name].numpy(), err_msg=name)


CLIP_WIDTH, CLIP_OUT = 128, 24


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The towers of a CLIP of noisy images, and the folder with their files."""
    folder = tmp_path_factory.mktemp("clip")
    text = ClipTower(ClipText(65536, 77, CLIP_WIDTH), CLIP_WIDTH, 2, CLIP_OUT, causal=True)
    images = ClipImage(SIDE, 4, CLIP_WIDTH, 1000)
    vision = ClipTower(images, CLIP_WIDTH, 2, CLIP_OUT, causal=False)
    for seed, (name, tower) in enumerate((("text", text), ("image", vision))):
        torch.save(randomise(tower, seed).state_dict(), folder / f"clip_{name}_enc.pt")
    return text, vision, folder


def clip_ids(*texts):
    rows = tokenize(tokenizer_of(clip_tokenizer("!")), texts)
    return torch.from_numpy(rows).long(), (rows == 49407).argmax(axis=1)


def test_clip_of_noisy_images(clip):
    text, vision, folder = clip
    ours = read_glide_clip(folder)
    rows, ends = clip_ids(PROMPT, "a much longer text")
    x, t = image((2, SIDE, SIDE, 3)), np.array([0, 731])
    with torch.no_grad():
        agree(ours.text_embeds(jnp.asarray(rows.numpy())), text(rows, place=ends))
        want = vision(nchw(x), torch.from_numpy(t))
    mean, std = (np.array(each, np.float32) for each in (MEAN, STD))
    got = ours.image_embeds(jnp.asarray((x / 2 + 0.5 - mean) / std), jnp.asarray(t))
    agree(got, want)
    assert float(ours.logit_scale[...]) == pytest.approx(np.log(100))
    assert ours.vision_model.config.num_timesteps == 1000


@models("base")
def test_guidance_by_a_clip_of_noisy_images(pair, clip):
    """The mean of each step moves along the logit of the text, without the empty text."""
    theirs, ours = pair
    text, vision, folder = clip
    ours.load_clip(folder)
    noise, scale = image((1, SIDE, SIDE, 3), 5), 0.05
    rows, ends = clip_ids(PROMPT)
    with torch.no_grad():
        wanted = text(rows, place=ends)

    def gradient(x, t):
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            logit = 100 * (vision(x, torch.tensor([t])) * wanted).sum()
            return scale * torch.autograd.grad(logit, x)[0]

    want = sample(
        predict(theirs, 1.0), nchw(noise), "cosine", STEPS, draw=draw(SIDE), gradient=gradient
    )
    options = {"steps": STEPS, "height": SIDE, "width": SIDE, "latents": noise, "seed": SEED}
    got = ours(PROMPT, guidance_scale=1.0, clip_scale=scale, output="latent", **options).images
    compare(got, want, noise)
    plain = ours(PROMPT, guidance_scale=1.0, output="latent", **options).images
    assert np.abs(got - plain).max() > 0.05
