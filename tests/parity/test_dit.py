"""DiTTransformer2DModel and DiTPipeline against diffusers, in several shapes."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, compare_gradients, copy, image, nchw, randomise
from flax import nnx
from tiny import first_devices

import jaxdiff
from jaxdiff.core.configs import from_mapping
from jaxdiff.models.dit.config import DiTTransformer2DConfig
from jaxdiff.models.dit.module import DiTTransformer2DModel
from jaxdiff.samplers.base import per_sample_keys, step_noise

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLASSES = 1000  # diffusers' pipeline has no other null label


def config(**fields):
    """A small config."""
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 5,
        **fields,
    }


CONFIGS = {
    "learned-variance": config(out_channels=8),
    "plain": config(in_channels=3),
    "patches-of-four": config(patch_size=4, sample_size=16, out_channels=8),
    "exact-gelu": config(activation_fn="gelu", attention_bias=False, norm_eps=1e-3),
    "geglu": config(activation_fn="geglu", patch_size=1, sample_size=4),
}


def pair(fields):
    theirs = randomise(diffusers.DiTTransformer2DModel(**fields))
    ours = from_mapping(DiTTransformer2DConfig, fields, source="test")
    return theirs, copy(theirs, DiTTransformer2DModel, ours)


def inputs(config, size):
    made = {
        "sample": image((3, *size, config.in_channels)),
        "timesteps": np.array([0, 500.5, 999], np.float32),
        "class_labels": np.array([0, config.num_embeds_ada_norm, 2], np.int32),
    }
    return {name: jnp.asarray(array) for name, array in made.items()}


def call_theirs(theirs, made):
    return theirs(
        nchw(np.asarray(made["sample"])),
        timestep=torch.from_numpy(np.array(made["timesteps"])),
        class_labels=torch.from_numpy(np.array(made["class_labels"])).long(),
    ).sample


@pytest.mark.parametrize("name", CONFIGS)
def test_output(name):
    theirs, ours = pair(CONFIGS[name])
    made = inputs(ours.config, (ours.config.sample_size,) * 2)
    agree(jax.jit(lambda made: ours(**made))(made), call_theirs(theirs, made))


@pytest.mark.parametrize("side", [4, 12])
def test_other_sizes_interpolate_positions(side):
    theirs, ours = pair(CONFIGS["learned-variance"])
    made = inputs(ours.config, (side, side))
    agree(jax.jit(lambda made: ours(**made))(made), call_theirs(theirs, made))


def test_gradients():
    theirs, ours = pair(CONFIGS["plain"])
    made = inputs(ours.config, (8, 8))
    # In float64, so that only our rounding counts.
    theirs = theirs.double()
    theirs(
        nchw(np.asarray(made["sample"])).double(),
        timestep=torch.from_numpy(np.array(made["timesteps"])).double(),
        class_labels=torch.from_numpy(np.array(made["class_labels"])).long(),
    ).sample.square().mean().backward()
    graph, state = nnx.split(ours)

    def loss(state):
        return jnp.square(nnx.merge(graph, state)(**made)).mean()

    compare_gradients(nnx.merge(graph, jax.jit(jax.grad(loss))(state)), theirs)


STEPS = 20


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """A pipeline with a learned variance and names of classes, in diffusers and here."""
    folder = tmp_path_factory.mktemp("dit")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.3,
    )
    network = diffusers.DiTTransformer2DModel(**config(out_channels=8, num_embeds_ada_norm=CLASSES))
    theirs = diffusers.DiTPipeline(
        transformer=randomise(network, 1),
        vae=randomise(vae, 2),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        id2label={i: f"thing {i}, object number {i}" for i in range(CLASSES)},
    )
    theirs.save_pretrained(folder)
    # diffusers does not store the names that it was given.
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): f"thing {i}, object number {i}" for i in range(CLASSES)}
    (folder / "model_index.json").write_text(json.dumps(index))
    theirs = diffusers.DiTPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return theirs, first_devices(jaxdiff.load(folder, dtype="float32"), 1)


def scheduler(theirs, name):
    kinds = {"ddim": diffusers.DDIMScheduler, "dpmpp-2m": diffusers.DPMSolverMultistepScheduler}
    theirs.scheduler = kinds[name].from_config(theirs.scheduler.config)


@pytest.mark.parametrize(("sampler", "scale"), [("ddim", 1.0), ("ddim", 4.0), ("dpmpp-2m", 4.0)])
def test_classes(pipes, monkeypatch, sampler, scale):
    """The latents after 20 steps, which diffusers decodes at once."""
    theirs, ours = pipes
    noise = image((2, 8, 8, 4), seed=5)
    monkeypatch.setattr(
        "diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda shape, **_: nchw(noise)
    )
    found = []
    decode = theirs.vae.decode
    monkeypatch.setattr(theirs.vae, "decode", lambda z: found.append(z) or decode(z))
    scheduler(theirs, sampler)
    labels = [207, 3]
    want = theirs(labels, num_inference_steps=STEPS, guidance_scale=scale, output_type="np").images
    options = {"steps": STEPS, "latents": noise, "guidance_scale": scale, "sampler": sampler}
    got = ours(["object number 207", "3"], output="latent", **options)
    latents = found[0].numpy().transpose(0, 2, 3, 1) * 0.3
    error = np.abs(got.images - latents).max() / np.abs(latents).max()
    assert error < 1e-3, error
    assert np.abs(latents - noise).max() > 0.1
    pixels = ours("", class_label=labels, output="numpy", **options).images
    assert np.abs(pixels / 255 - want).max() < 1.01 / 255


@pytest.fixture(scope="module")
def learned(pipes, tmp_path_factory):
    """The same networks with a scheduler that reads the variance, and what jaxdiff loads of it.

    Its network predicts v, as latents of one that predicts noise at random would grow.
    """
    theirs, _ = pipes
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False, variance_type="learned_range", prediction_type="v_prediction"
    )
    folder = tmp_path_factory.mktemp("learned")
    parts = {"transformer": theirs.transformer, "vae": theirs.vae, "scheduler": scheduler}
    diffusers.DiTPipeline(**parts).save_pretrained(folder)
    return scheduler, first_devices(jaxdiff.load(folder, dtype="float32"), 1)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_ddpm_with_the_learned_variance(pipes, learned, monkeypatch, scale):
    """20 steps with the same noises; guided is the image, and the variance is that of the class.

    diffusers' DiTPipeline leaves the variance out; its scheduler and its pipelines of DeepFloyd IF
    do it as the authors of DiT do.
    """
    (theirs, _), (scheduler, ours) = pipes, learned
    labels, seeds, noise = [207, 3], [5, 6], image((2, 8, 8, 4), seed=5)
    drawn = iter(range(STEPS))

    def draw(shape, **_):
        z = step_noise(per_sample_keys(seeds), next(drawn), (8, 8, 4), jnp.dtype("float32"))
        return nchw(np.asarray(z))

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", draw)
    scheduler.set_timesteps(STEPS)
    x, rows = nchw(noise), torch.tensor([*labels, CLASSES, CLASSES])
    for t in scheduler.timesteps:
        with torch.no_grad():
            both = theirs.transformer(
                torch.cat([x, x]), timestep=t.expand(4), class_labels=rows
            ).sample
        (cond, variance), (uncond, _) = (half.split(4, dim=1) for half in both.chunk(2))
        output = torch.cat([uncond + scale * (cond - uncond), variance], dim=1)
        x = scheduler.step(output, t, x).prev_sample
    want = x.numpy().transpose(0, 2, 3, 1)

    options = {"steps": STEPS, "latents": noise, "guidance_scale": scale, "seed": seeds}
    got = ours(["207", "3"], output="latent", **options).images
    assert ours.defaults.sampler == "ddpm:variance=learned_range"
    largest = np.abs(want).max()
    assert np.abs(got - want).max() < 1e-3 * largest
    fixed = ours(["207", "3"], output="latent", sampler="ddpm", **options).images
    assert np.abs(fixed - got).max() > 0.02 * largest


def test_the_folder_is_loaded_by_diffusers(pipes, tmp_path):
    theirs, ours = pipes
    ours.save(tmp_path / "saved")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "saved")
    assert again.labels["object number 207"] == 207
    made = inputs(ours.transformer.config, (8, 8))
    assert torch.equal(call_theirs(again.transformer, made), call_theirs(theirs.transformer, made))
