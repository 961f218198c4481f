"""The train command for VAEs that are fine-tuned: against a discriminator, or the decoder only."""

import dataclasses
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_component

from jaxdiff.checkpoints.components import Component, read_component, write_component
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.cli.train import run
from jaxdiff.core.errors import InputError
from jaxdiff.experiments import experiment, vae
from jaxdiff.experiments.loggers import read_lines
from jaxdiff.models.build import initialise, param_dict
from jaxdiff.models.clip import CLIPModel
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.training.config import VAEObjective
from jaxdiff.training.objectives.vae import decoder_input

pytestmark = pytest.mark.usefixtures("standard_promotion")
MODEL = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(2, 4),
    norm_num_groups=2,
    latent_channels=2,
    mid_block_add_attention=False,
    scaling_factor=0.7,
)
CONFIG = f"""
from jaxdiff.models.discriminator import PatchDiscriminatorConfig
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.training.config import OptimiserConfig, TrainConfig, VAEObjective
from jaxdiff.models.vae import AutoencoderKLConfig
config = TrainConfig(
    objective=VAEObjective(
        model={MODEL!r}, weights="FOLDER/vae", perceptual_model="FOLDER", adversarial_weight=0.5,
        adversarial_start=2,
        discriminator=PatchDiscriminatorConfig(width=4, layers=1, norm_num_groups=4),
    ),
    optimiser=OptimiserConfig(learning_rate=1e-3, warmup_steps=1),
    steps=4, batch_size=8, log_every=1, checkpoint_every=2, sample_every=4)
"""
ENCODING = ("encoder.", "quant_conv.")


@pytest.fixture(scope="module", autouse=True)
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "VALIDATION_BATCH", 16)
        patch.setattr(vae, "SCALE_ESTIMATION_IMAGES", 64)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A VAE in half precision, of which its file says something more, and a CLIP model."""
    folder = tmp_path_factory.mktemp("given")
    component = random_component(AutoencoderKL, MODEL, seed=4)
    told = dataclasses.replace(component, config={"_name_or_path": "elsewhere/vae"})
    write_component(folder / "vae", told, dtype=jax.numpy.float16)
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 1}
    text = CLIPTextConfig(vocab_size=20, max_position_embeddings=4, **sizes)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, **sizes)
    clip = Component(module=initialise(CLIPModel, text, vision, 4, seed=5))
    write_component(folder / "clip", clip)
    return folder


def command(folder, workdir, *more):
    path = folder / "tuned.py"
    path.write_text(CONFIG.replace("FOLDER", str(folder)))
    return [str(path), "--workdir", str(workdir), *more]


@pytest.mark.slow
def test_only_the_decoder_is_trained_where_asked(folder, tmp_path):
    flags = ["--objective.freeze-encoder", "--dtype", "bfloat16"]
    run(command(folder, tmp_path / "w", *flags))
    export = tmp_path / "w" / "export"
    given, ended = (read_component(place).module for place in (folder / "vae", export))
    assert ended.config == given.config
    assert read_object(export / "config.json")["_name_or_path"] == "elsewhere/vae"
    before, after = param_dict(given), param_dict(ended)
    for name, array in before.items():
        same = np.array_equal(np.asarray(array, np.float32), after[name])
        assert same == name.startswith(ENCODING), name
    log = read_lines(tmp_path / "w" / "log.jsonl")
    assert [line["adversarial_weight"] > 0 for line in log] == [False, False, True, True]
    assert all(np.isfinite(value) for line in log for value in line.values())
    other = folder.parent / "other"
    shutil.copytree(folder, other, dirs_exist_ok=True)
    write_component(other / "vae", random_component(AutoencoderKL, MODEL, seed=9))
    with pytest.raises(InputError, match=r"weights of the encoder: got \w+, expected \w+ as"):
        run(command(other, tmp_path / "w", *flags))


@pytest.mark.slow
def test_a_frozen_encoder_brings_its_scaling(folder, tmp_path):
    start = ["--objective.freeze-encoder", "--objective.latent-noise", "0.3"]
    options = [
        *start,
        "--objective.perceptual-model",
        "None",
        "--objective.adversarial-weight",
        "0",
    ]
    options += ["--objective.adversarial-start", "0", "--steps", "1"]
    path = pathlib.Path(command(folder, tmp_path)[0])
    plain = re.sub(r"discriminator=.*\n", "", path.read_text())
    path.write_text(plain.replace("scaling_factor=0.7", "scaling_factor=0.18215"))
    run([str(path), "--workdir", str(tmp_path / "w"), *options])
    assert read_component(tmp_path / "w" / "export").module.config.scaling_factor == 0.7
    path.write_text(plain.replace("scaling_factor=0.7", "scaling_factor=0.5"))
    with pytest.raises(InputError, match=r"scaling_factor: got 0.5, expected 0.7 as"):
        run([str(path), "--workdir", str(tmp_path / "other"), *options])


def test_latent_noise_adds_its_variance():
    """A standard deviation uniform in [0, s] has the mean square s^2 / 3."""
    config = dataclasses.replace(VAEObjective(), model=MODEL, weights="x", freeze_encoder=True)
    mean, logvar = jnp.zeros((2000, 4, 4, 2)), jnp.full((2000, 4, 4, 2), -100.0)
    key = jax.random.key(0)
    assert not np.any(np.abs(decoder_input(config, mean, logvar, key)) > 1e-15)
    noisy = decoder_input(dataclasses.replace(config, latent_noise=0.6), mean, logvar, key)
    scaled = MODEL.scaling_factor * np.asarray(noisy, np.float64)
    np.testing.assert_allclose(np.mean(scaled**2), 0.6**2 / 3, rtol=0.05)
    each = np.sqrt(np.mean(scaled**2, axis=(1, 2, 3)))
    assert each.min() < 0.02
    assert 0.6 < each.max() < 0.95


def test_latent_noise_needs_a_frozen_encoder():
    with pytest.raises(InputError, match=r"latent_noise: got 0\.1 without"):
        VAEObjective(latent_noise=0.1)


@pytest.mark.slow
def test_a_tuned_vae_is_resumed_to_the_same_end(folder, tmp_path):
    run(command(folder, tmp_path / "w"))
    export = tmp_path / "w" / "export"
    ended = param_dict(read_component(export).module)
    given = param_dict(read_component(folder / "vae").module)
    for name, array in ended.items():
        distance = np.abs(array - np.asarray(given[name], np.float32)).max()
        assert 0 < distance < 4 * 2e-3, name  # Adam's steps are about as long as the rate
    assert read_component(export).module.config.scaling_factor != 0.7
    log = read_lines(tmp_path / "w" / "log.jsonl")
    shutil.rmtree(export)
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "4")
    moved = tmp_path / "elsewhere"  # what it began with is not needed again
    shutil.copytree(folder / "clip", moved / "clip")
    run(command(moved, tmp_path / "w"))
    again = read_lines(tmp_path / "w" / "log.jsonl")
    assert [line["loss"] for line in again] == [line["loss"] for line in log]
    for name, array in param_dict(read_component(export).module).items():
        np.testing.assert_array_equal(array, ended[name])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective.model.latent-channels", "3"], "latent_channels: got 3, expected 2 as"),
        (
            ["--objective.freeze-encoder", "--objective.model.scaling-factor", "0.5"],
            r"scaling_factor: got 0\.5, expected 0\.7 as",
        ),
    ],
)
def test_another_model_than_that_of_the_weights_is_refused(folder, tmp_path, flags, message):
    with pytest.raises(InputError, match=rf"objective\.model\.{message}"):
        run(command(folder, tmp_path / "w", *flags))
    assert not (tmp_path / "w").exists()


def test_a_folder_of_something_else_is_refused(folder, tmp_path):
    for name, place in (("weights", "clip"), ("perceptual_model", "vae")):
        with pytest.raises(InputError, match=r"got (CLIPModel|AutoencoderKL) in"):
            run(command(folder, tmp_path / "w", f"--objective.{name}", str(folder / place)))
