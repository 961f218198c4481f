"""Stable unCLIP: images as prompts, noise in their embeddings, and a folder of two models."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import unclip_files
from PIL import Image
from tiny import first_devices

import jaxdiff
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.families.detection import detect_family
from jaxdiff.models.build import abstract, with_params
from jaxdiff.models.unclip import StableUnCLIPImageNormalizer, StableUnCLIPImageNormalizerConfig
from jaxdiff.pipeline.cascade import Cascade
from jaxdiff.pipeline.image_encoder import image_embeddings
from jaxdiff.pipeline.load import one_model
from jaxdiff.training.config import DiffusionObjective

PROMPT, WIDTH = "a small red circle", unclip_files.WIDTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unclip")
    write_pipeline(folder / "variations", unclip_files.variations(folder / "a"))
    write_pipeline(folder / "both", unclip_files.with_prior(folder / "b"))
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return first_devices(jaxdiff.load(folder / "variations", dtype="float32"), 1)


def pictures(count):
    rng = np.random.default_rng(2)
    return [Image.fromarray(rng.integers(0, 256, (20, 12, 3), np.uint8)) for _ in range(count)]


def test_a_batch_of_variations_is_its_images_alone(pipe):
    images = pictures(2)
    options = {"noise_level": 400, "output": "latent"}
    together = pipe(PROMPT, image=images, seed=[3, 4], **options).images
    alone = pipe(PROMPT, image=images[1], seed=4, **options).images
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)
    embeds = image_embeddings(pipe, images)
    given = pipe(PROMPT, image_embeds=embeds, seed=[3, 4], **options).images
    np.testing.assert_allclose(given, together, atol=1e-5)
    levels = pipe(PROMPT, image=images[1], seed=4, noise_level=[400, 0], output="latent").images
    np.testing.assert_allclose(levels[0], alone[0], atol=1e-5)
    assert np.abs(levels[1] - alone[0]).max() > 1e-2


def test_noise_is_between_mean_and_deviation(pipe):
    """Of a standard normal embedding, noised, each level has the statistics that it began with."""
    (extra,) = pipe.family.extras
    config = StableUnCLIPImageNormalizerConfig(embedding_dim=4)
    mean, std = np.array([[1.0, -2.0, 0.0, 3.0]]), np.array([[0.5, 2.0, 1.0, 3.0]])
    statistics = {"mean": jnp.asarray(mean, "float32"), "std": jnp.asarray(std, "float32")}
    normaliser = with_params(abstract(StableUnCLIPImageNormalizer, config), statistics)
    own = dataclasses.replace(extra, normaliser=normaliser, width=4)
    rng, count = np.random.default_rng(1), 20_000
    embeddings = (mean + std * rng.normal(size=(count, 4))).astype(np.float32)
    noise = rng.normal(size=(count, 4)).astype(np.float32)
    for level in (0, 500, 999):
        noisy = own.noisy(embeddings, noise, np.full(count, level, np.int32))
        np.testing.assert_allclose(noisy[:, :4].mean(0), mean[0], atol=0.1)
        np.testing.assert_allclose(noisy[:, :4].std(0), std[0], rtol=0.05)
        frequencies = level * np.array([1, 10000**-0.5])
        want = np.concatenate([np.cos(frequencies), np.sin(frequencies)])
        np.testing.assert_allclose(noisy[0, 4:], want, atol=1e-4)
        alpha, _ = VPSchedule(beta_schedule="squaredcos_cap_v2").alpha_sigma(np.array([level]))
        kept = np.corrcoef(noisy[:, 0], embeddings[:, 0])[0, 1]
        np.testing.assert_allclose(kept, alpha[0], atol=0.02)


def test_an_original_image_is_changed(pipe):
    image, original = pictures(1)[0], np.zeros((16, 16, 3), np.uint8)
    options = {"image": image, "output": "numpy"}
    little = pipe(PROMPT, original_image=original, strength=0.5, **options).images
    assert little.shape == (1, 16, 16, 3)
    assert (little != pipe(PROMPT, **options).images).any()
    inverted = pipe.invert(original, PROMPT, image_embeds=np.ones(WIDTH, np.float32))
    assert inverted.shape == (1, 8, 8, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "image: got none, expected one, or its embedding, image_embeds"),
        ({"image_embeds": np.zeros(3)}, r"shape \(3,\), expected \(8\)"),
        ({"noise_level": 1000}, "noise_level: got 1000, expected a number from 0 to 999"),
        ({"noise_level": -1}, "noise_level: got -1"),
        ({"strength": 0.5}, "strength: got 0.5 without an original_image"),
    ],
)
def test_requests_that_do_not_fit_are_refused(pipe, options, message):
    image = pictures(1)[0]
    if "noise_level" in options or "strength" in options:
        options = {**options, "image": image}
    with pytest.raises(InputError, match=message):
        pipe.resolve(PROMPT, **options)
    with pytest.raises(InputError, match="image: got one with image_embeds"):
        pipe.resolve(PROMPT, image=image, image_embeds=np.zeros(WIDTH))


def test_two_models_in_one_folder(folder, tmp_path):
    both = jaxdiff.load(folder / "both", dtype="float32")
    assert isinstance(both, Cascade)
    prior, decoder = pipes = [first_devices(each, 1) for each in both.pipes]
    assert [each.name for each in both.pipes] == ["both/prior", "both/decoder"]
    assert [each.defaults.steps for each in pipes] == [3, 2]
    out = Cascade(*pipes)(PROMPT, seed=[3, 5], output="latent")
    embeddings = prior(PROMPT, seed=[3, 5]).images
    want = decoder(PROMPT, image_embeds=embeddings, seed=[3, 5], output="latent").images
    np.testing.assert_allclose(out.images, want, atol=1e-5)
    with pytest.raises(InputError, match="image_embeds: got none, expected the embedding"):
        decoder.resolve(PROMPT)
    with pytest.raises(InputError, match=r"several models \(Stable unCLIP prior, Stable unCLIP\)"):
        one_model(both)
    # Each is a model of its own when it is saved, and the folder is written as it was read.
    decoder.save(tmp_path / "decoder")
    alone = first_devices(jaxdiff.load(tmp_path / "decoder", dtype="float32"), 1)
    again = alone(PROMPT, image_embeds=embeddings, seed=[3, 5], steps=2, output="latent").images
    np.testing.assert_allclose(again, want, atol=1e-5)
    parts = read_pipeline(folder / "both")
    write_pipeline(tmp_path / "copy", parts)
    copy = read_pipeline(tmp_path / "copy")
    assert copy.schedulers == parts.schedulers
    assert copy.components.keys() == parts.components.keys()
    modules = {name: each.module for name, each in parts.components.items()}
    with pytest.raises(InputError, match=r"several models \(prior, decoder\), expected one"):
        detect_family(parts.class_name, modules, source="both")


def test_a_mesh_shares_the_models(folder):
    options = {"seed": [3, 4], "output": "latent"}
    meshed = jaxdiff.load(folder / "both", dtype="float32", mesh={"fsdp": 2, "tensor": 2})
    plain = jaxdiff.load(folder / "both", dtype="float32")
    one = Cascade(*(first_devices(each, 1) for each in plain.pipes))
    got, want = (each(PROMPT, **options).images for each in (meshed, one))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unet", {"projection_class_embeddings_input_dim": 8}, "projection of width 8, expected"),
        ("image_encoder", {"projection_dim": 4}, "image_encoder: got projection_dim 4, expected 8"),
        ("image_normalizer", None, "image_normalizer: got none, expected StableUnCLIPImageNorm"),
        ("image_encoder", None, "image_encoder: got none, expected CLIPVisionModel"),
    ],
)
def test_components_that_do_not_fit_are_refused(pipe, name, change, message):
    modules = {key: each.module for key, each in pipe.parts.components.items()}
    if change is None:
        modules.pop(name)
    else:
        config = dataclasses.replace(modules[name].config, **change)
        options = {"with_projection": True} if name == "image_encoder" else {}
        modules[name] = abstract(type(modules[name]), config, **options)
    options = unclip_files.NOISING
    with pytest.raises(InputError, match=message):
        detect_family("StableUnCLIPImg2ImgPipeline", modules, options, source="model")


def test_what_cannot_be_trained_is_named(tmp_path):
    for name, make in {"one": unclip_files.variations, "two": unclip_files.with_prior}.items():
        write_pipeline(tmp_path / name, make(tmp_path / f"of-{name}"))
    with pytest.raises(InputError, match=r"objective\.pipeline: got a network of texts and embed"):
        load_base_model(DiffusionObjective(pipeline=str(tmp_path / "one")))
    with pytest.raises(InputError, match="which is several models"):
        load_base_model(DiffusionObjective(pipeline=str(tmp_path / "two")))
