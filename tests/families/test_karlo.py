"""Karlo: three models in one folder, and its networks of two parts."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import unclip_files
from tiny import first_devices

import jaxdiff
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.families.detection import detect_family
from jaxdiff.generation.png_files import read_settings
from jaxdiff.models.build import abstract
from jaxdiff.models.karlo import KarloSuperResolution
from jaxdiff.pipeline.cascade import Cascade

PROMPT, WIDTH = "a small red circle", unclip_files.WIDTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("karlo")
    write_pipeline(folder / "karlo", unclip_files.karlo(folder / "a"))
    write_pipeline(folder / "variations", unclip_files.karlo_variations(folder / "b"))
    return folder


@pytest.fixture(scope="module")
def pipes(folder):
    loaded = jaxdiff.load(folder / "karlo", dtype="float32")
    assert isinstance(loaded, Cascade)
    return [first_devices(pipe, 1) for pipe in loaded.pipes]


def test_a_batch_is_its_images_alone(pipes):
    cascade = Cascade(*pipes)
    options = {"seed": [3, 5], "negative_prompt": "a ring", "output": "latent"}
    together = cascade([PROMPT, "a star"], **options).images
    assert together.shape == (2, 16, 16, 3)
    alone = cascade("a star", **{**options, "seed": 5}).images
    np.testing.assert_allclose(together[1], alone[0], atol=1e-4)
    # The same by hand.
    prior, decoder, enlarging = pipes
    call = {"seed": 5, "negative_prompt": "a ring"}
    embedding = prior("a star", **call).images
    small = decoder("a star", image_embeds=embedding, output="latent", **call).images
    large = enlarging("", image=small, seed=5, output="latent").images
    np.testing.assert_allclose(large, alone, atol=1e-4)


def test_the_embedding_and_the_learned_one_count(pipes):
    _, decoder, _ = pipes
    one, other = np.random.default_rng(1).normal(size=(2, WIDTH)).astype(np.float32)
    call = {"seed": 5, "output": "latent"}
    images = [
        decoder(PROMPT, image_embeds=embedding, guidance_scale=scale, **call).images
        for embedding, scale in ((one, 1.0), (other, 1.0), (one, 3.0))
    ]
    assert np.abs(images[0] - images[1]).max() > 1e-3
    assert np.abs(images[0] - images[2]).max() > 1e-3
    (extra,) = decoder.family.extras
    learned = extra.text_proj.learned_classifier_free_guidance_embeddings[...]
    both = extra.for_prompted(one[None], np.asarray(learned), (True, False))
    np.testing.assert_array_equal(both, np.stack([one, np.asarray(learned)])[None])


def test_the_last_step_has_a_network_of_its_own(pipes):
    _, _, enlarging = pipes
    parts = enlarging.parts.components
    first, last = (parts[f"super_res_{name}"].module for name in ("first", "last"))
    pair = KarloSuperResolution(first, last)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 4, 6)), jnp.float32)
    t = jnp.asarray([0.0, 500.0, 1.0])
    out = pair(x, t)
    np.testing.assert_allclose(out[0], last(x, t)[0], atol=1e-5)
    np.testing.assert_allclose(out[1:], first(x, t)[1:], atol=1e-5)
    assert np.abs(last(x, t) - first(x, t)).max() > 1e-2
    np.testing.assert_allclose(pair(x[:1], t[:1]), last(x[:1], t[:1]), atol=1e-5)


def test_variations_of_images(folder):
    loaded = jaxdiff.load(folder / "variations", dtype="float32")
    first, second = (first_devices(pipe, 1) for pipe in loaded.pipes)
    images = np.random.default_rng(2).integers(0, 256, (2, 9, 12, 3), np.uint8)
    cascade = Cascade(first, second)
    together = cascade("", image=images, seed=[3, 4], output="latent").images
    alone = cascade("", image=images[1], seed=4, output="latent").images
    assert alone.shape == (1, 16, 16, 3)
    np.testing.assert_allclose(together[1], alone[0], atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_the_folder_is_written_as_it_was_read(folder, pipes, tmp_path):
    parts = read_pipeline(folder / "karlo")
    write_pipeline(tmp_path / "copy", parts)
    indices = [
        json.loads((each / "model_index.json").read_text())
        for each in (folder / "karlo", tmp_path / "copy")
    ]
    assert indices[0] == indices[1]
    assert indices[0]["text_proj"] == ["unclip", "UnCLIPTextProjModel"]
    assert "scheduler" not in indices[0]
    assert not (tmp_path / "copy" / "scheduler").exists()
    pipes[2].save(tmp_path / "alone")
    alone = first_devices(jaxdiff.load(tmp_path / "alone", dtype="float32"), 1)
    image = np.random.default_rng(2).integers(0, 256, (8, 8, 3), np.uint8)
    call = {"image": image, "steps": 2, "output": "latent"}
    np.testing.assert_allclose(alone("", **call).images, pipes[2]("", **call).images, atol=1e-5)


def test_a_mesh_shares_the_models(folder, pipes):
    options = {"seed": [3, 4], "output": "latent"}
    meshed = jaxdiff.load(folder / "karlo", dtype="float32", mesh={"fsdp": 2, "tensor": 2})
    got, want = (each(PROMPT, **options).images for each in (meshed, Cascade(*pipes)))
    np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("decoder", {"class_embed_type": None}, "decoder: got class_embed_type None"),
        ("decoder", {"cross_attention_dim": 16}, "decoder: got .* a context of width 16"),
        ("decoder", {"in_channels": 4, "out_channels": 8}, "decoder: got 4 channels in and 8 out"),
        ("text_proj", {"clip_embeddings_dim": 4}, "hidden states of width 8, expected 4"),
        ("text_encoder", {"projection_dim": 4}, "text_encoder: got projection_dim 4, expected 8"),
        ("text_proj", None, "text_proj: got none, expected UnCLIPTextProjModel"),
    ],
)
def test_components_that_do_not_fit_are_refused(pipes, name, change, message):
    modules = {key: each.module for key, each in pipes[1].parts.components.items()}
    if change is None:
        modules.pop(name)
    else:
        config = dataclasses.replace(modules[name].config, **change)
        options = {"with_projection": True} if name == "text_encoder" else {}
        modules[name] = abstract(type(modules[name]), config, **options)
    with pytest.raises(InputError, match=message):
        detect_family("UnCLIPDecoderPipeline", modules, source="model")


def test_what_it_does_not_read_is_refused(pipes):
    _, decoder, enlarging = pipes
    for pipe, options, message in (
        (decoder, {}, "image_embeds: got none, expected the embedding of an image"),
        (enlarging, {"prompt": "a star"}, "prompt: got 'a star', expected none for Karlo super"),
        (enlarging, {"guidance_scale": 4.0}, "guidance_scale: got 4.0 with guidance none"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.resolve(**{"prompt": "", **options})
    with pytest.raises(InputError, match="image: got none, expected the image to enlarge"):
        enlarging("")


def test_the_command_generates_with_all_models_of_a_folder(folder, tmp_path, capsys):
    def generate(name, *arguments):
        given = ("--model", str(folder / name), "--output", str(tmp_path / "out"))
        return main.run("generate", [*arguments, *given])

    own = ("--then", ":guidance_scale=2", "--then", ":steps=3")
    assert generate("karlo", PROMPT, "--guidance-scale", "2", *own) == 0
    (path,) = (tmp_path / "out").glob("*.png")
    settings = read_settings(path)
    assert settings["model"] == "karlo/prior"
    assert [stage.pop("model").split()[0] for stage in settings["then"]] == [
        "karlo/decoder",
        "karlo/super_res",
    ]
    assert settings["then"] == [{"guidance_scale": 2}, {"steps": 3}]
    assert generate("karlo", PROMPT, *own, "--then", ":steps=2") == 2
    assert "then: got the options of 3 models without a name" in capsys.readouterr().err
    assert generate("variations", "", "--image", str(path)) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert main.run("inspect", [str(folder / "karlo")]) == 0
    assert "super_res_last" in capsys.readouterr().out
    copy = tmp_path / "half"
    assert main.run("convert", [str(folder / "karlo"), str(copy), "--dtype", "float16"]) == 0
    assert read_pipeline(copy).stage_schedulers.keys() == {
        f"{name}_scheduler" for name in ("prior", "decoder", "super_res")
    }
