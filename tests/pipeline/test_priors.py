"""Priors, which generate embeddings of images, and decoders of these."""

import dataclasses

import cascade_files
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import first_devices

import jaxdiff
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.families.detection import detect_family
from jaxdiff.models.latent_codec import ImageEmbeddings
from jaxdiff.pipeline.cascade import Cascade
from jaxdiff.pipeline.embedding_decoder import EmbeddingDecoder
from jaxdiff.pipeline.image_encoder import image_embeddings, zero_image_embedding
from jaxdiff.pipeline.nonfinite import NonFiniteImageError
from jaxdiff.pipeline.stages import HiresFix

PROMPT, WIDTH = "a small red circle", cascade_files.WIDTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kandinsky")
    write_pipeline(folder / "prior", cascade_files.prior(folder / "of-prior"))
    write_pipeline(folder / "decoder", cascade_files.decoder(folder / "of-decoder"))
    return folder


@pytest.fixture(scope="module")
def pipes(folder):
    names = ("prior", "decoder")
    return [first_devices(jaxdiff.load(folder / name, dtype="float32"), 1) for name in names]


def test_a_prior_generates_embeddings(pipes):
    first, _ = pipes
    assert first.defaults.clipping == "clip-sample:limit=5.0"
    together = first([PROMPT, "a ring"], seed=[3, 4])
    assert together.images.shape == (2, WIDTH)
    assert together.images.dtype == np.float32
    alone = first("a ring", seed=4, intermediate_steps=(0, 2))
    np.testing.assert_allclose(together.images[1], alone.images[0], atol=1e-5)
    assert alone.intermediates.x.shape == (2, 1, WIDTH)
    latents = first("a ring", seed=4, output="latent").images
    codec = ImageEmbeddings(first.network.clip_mean, first.network.clip_std)
    np.testing.assert_allclose(codec.unscale(jnp.asarray(latents)), alone.images, atol=1e-5)
    np.testing.assert_allclose(codec.scale(jnp.asarray(alone.images)), latents, atol=1e-4)


def test_a_decoder_follows_a_prior(pipes):
    first, second = pipes
    out = Cascade(first, second)(PROMPT, seed=[3, 5], output="latent")
    embeddings = first(PROMPT, seed=[3, 5]).images
    zero = zero_image_embedding(first)
    own = {"image_embeds": embeddings, "negative_image_embeds": zero[0], "seed": [3, 5]}
    want = second("", **own, output="latent")
    np.testing.assert_allclose(out.images, want.images, atol=1e-5)
    assert Cascade(first, second)(PROMPT).images[0].size == (16, 16)
    text = want.requests[0].to_metadata()["image_embeds"]
    assert text.startswith("sha256 ")
    assert text != want.requests[1].to_metadata()["image_embeds"]


def test_a_negative_prompt_goes_through_the_prior(pipes):
    first, second = pipes
    call = {"negative_prompt": "a ring", "seed": 3}
    out = Cascade(first, second)(PROMPT, **call, output="latent")
    embeddings = first(PROMPT, **call).images
    negative = first("a ring", **call).images
    assert np.abs(negative - embeddings).max() > 1e-2
    own = {"image_embeds": embeddings, "negative_image_embeds": negative, "seed": 3}
    np.testing.assert_allclose(out.images, second("", **own, output="latent").images, atol=1e-5)


def test_a_negative_embedding_that_is_not_finite_fails_its_image_alone(pipes, monkeypatch):
    first, second = pipes
    generate = type(first).generate

    def broken(pipe, requests, **settings):
        out = generate(pipe, requests, **settings)
        if pipe is not first or requests[0].prompt != "a ring":
            return out
        images = np.full_like(out.images, np.nan)
        raise NonFiniteImageError(
            dataclasses.replace(out, images=images, failures={0: "from step 1 of 3"})
        )

    monkeypatch.setattr(type(first), "generate", broken)
    call = {"negative_prompt": ["a ring", None], "seed": [3, 4], "output": "numpy"}
    with pytest.raises(NonFiniteImageError, match="1 of 2 images") as caught:
        Cascade(first, second)([PROMPT, PROMPT], **call)
    assert caught.value.output.failures == {0: "from step 1 of 3"}
    assert caught.value.output.images.shape == (2, 16, 16, 3)
    alone = Cascade(first, second)(PROMPT, seed=4, output="numpy").images
    difference = caught.value.output.images[1].astype(int) - alone[0]
    assert np.abs(difference).max() <= 1


def test_mixed_embeddings_and_images_to_begin_with(pipes):
    _, second = pipes
    one, other = np.random.default_rng(1).normal(size=(2, WIDTH)).astype(np.float32)
    mixed = {"image_embeds": 0.3 * one + 0.7 * other, "negative_image_embeds": other}
    image = np.zeros((16, 16, 3), np.uint8)
    plain = second("", **mixed, output="numpy").images
    begun = second("", **mixed, image=image, strength=0.5, output="numpy").images
    assert plain.shape == begun.shape == (1, 16, 16, 3)
    assert (plain != begun).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "image_embeds: got none, expected the embedding of an image"),
        ({"image_embeds": np.zeros(WIDTH)}, "negative_image_embeds: got none"),
        (
            {"image_embeds": np.zeros(3), "guidance_scale": 1.0},
            r"shape \(3,\), expected \(8\)",
        ),
        ({"image_embeds": np.full(WIDTH, np.nan)}, "image_embeds: got numbers that are not finite"),
        ({"image_embeds": "a"}, "image_embeds: got 'a', expected an array of numbers"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(pipes, options, message):
    with pytest.raises(InputError, match=message):
        pipes[1].resolve("", **options)


def test_what_a_prior_cannot_do_is_refused(pipes):
    first, second = pipes
    with pytest.raises(InputError, match="height, width: got 64x1, expected none for Kandinsky"):
        first.resolve(PROMPT, height=64)
    with pytest.raises(InputError, match="image: got one for Kandinsky"):
        first(PROMPT, image=np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"image_embeds: got .* expected none"):
        first.resolve(PROMPT, image_embeds=np.zeros(WIDTH))
    for pair in ((second, second), (first, first), (first, HiresFix(first, 2.0))):
        with pytest.raises(InputError, match=r"(then|hires_scale): got"):
            Cascade(*pair)
    with pytest.raises(InputError, match="image_embeds: got it for one stage"):
        EmbeddingDecoder(second, first, {"image_embeds": np.zeros(WIDTH)})
    blind = without(first, "image_encoder")
    with pytest.raises(InputError, match="blind: got no image_encoder"):
        Cascade(blind, second)(PROMPT)
    with pytest.raises(InputError, match="blind: got no image_encoder"):
        image_embeddings(blind, np.zeros((8, 8, 3), np.uint8))


def without(pipe, name):
    """`pipe` without the component `name`."""
    parts = {key: part for key, part in pipe.parts.components.items() if key != name}
    own = dataclasses.replace(pipe.parts, components=parts)
    return jaxdiff.Pipeline(own, name="blind", devices=pipe.devices)


def test_without_guidance_no_image_of_zeros_is_encoded(pipes):
    first, second = pipes
    alone = Cascade(without(first, "image_encoder"), second)
    unguided = {"guidance_scale": 1.0}
    got = alone(PROMPT, seed=3, stage_options=[unguided], output="latent")
    assert "negative_image_embeds" not in got.request.extras
    want = Cascade(first, second)(PROMPT, seed=3, stage_options=[unguided], output="latent")
    np.testing.assert_array_equal(got.images, want.images)
    # One guided image beside it, which has a negative prompt.
    scales = {"guidance_scale": [1.0, 4.0]}
    both = alone(
        [PROMPT, PROMPT],
        negative_prompt=[None, "a ring"],
        seed=[3, 3],
        stage_options=[scales],
        output="latent",
    )
    np.testing.assert_allclose(both.images[0], want.images[0], atol=1e-4)
    assert np.abs(both.images[1] - both.images[0]).max() > 1e-3


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Decoders of 2.2 for inpainting, and with a hint."""
    folder = tmp_path_factory.mktemp("others")
    kinds = {
        "inpainting": {"in_channels": 9},
        "hint": {"in_channels": 8, "addition_embed_type": "image_hint"},
    }
    for name, fields in kinds.items():
        write_pipeline(folder / name, cascade_files.decoder(folder / f"of-{name}", **fields))
    loaded = {name: jaxdiff.load(folder / name, dtype="float32") for name in kinds}
    return {name: first_devices(pipe, 1) for name, pipe in loaded.items()}


def test_a_decoder_for_inpainting_follows_a_prior(pipes, others):
    first, _ = pipes
    image = np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[4:8, 6:10] = True
    cascade = Cascade(first, others["inpainting"])
    stage = {"image": image, "mask": mask}
    drawn = cascade(PROMPT, seed=3, stage_options=[stage], output="latent").images
    (latents,) = np.asarray(others["inpainting"].stages.latents(image[None, None] / 127.5 - 1))
    where = np.abs(drawn - np.asarray(latents)).max(axis=(0, -1)) > 1e-5
    # Those of the mask, rows 2 and 3 and columns 3 and 4, and their neighbours but for two corners.
    grown = np.zeros((8, 8), bool)
    grown[1:5, 2:6] = True
    grown[1, 5] = grown[4, 2] = False
    np.testing.assert_array_equal(where, grown)
    whole = cascade(PROMPT, seed=3, output="latent").images
    assert np.abs(whole - np.asarray(latents)).max(axis=(0, -1)).min() > 1e-5


def test_a_hint_is_an_image_of_any_kind(pipes, others, tmp_path):
    first, second = pipes
    depths = np.random.default_rng(3).integers(0, 256, (64, 64), np.uint8)
    picture = Image.fromarray(depths)
    picture.save(tmp_path / "depths.png")
    cascade, drawn = Cascade(first, others["hint"]), []
    kinds = (picture, tmp_path / "depths.png", np.stack([depths] * 3, axis=-1), 255 - depths)
    for hint in (*kinds[:3], Image.fromarray(kinds[3])):
        stage = {"hint": hint, "height": 16, "width": 16}
        drawn.append(cascade(PROMPT, seed=3, stage_options=[stage], output="latent").images)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert np.abs(drawn[0] - drawn[3]).max() > 1e-3
    out = cascade([PROMPT] * 2, seed=3, stage_options=[{"hint": [picture, kinds[2]]}])
    stored = [request.to_metadata()["hint"] for request in out.requests]
    assert stored[0] == stored[1]
    assert stored[0].startswith("sha256 ")
    (entry,) = cascade.stages[0].with_options({"hint": str(kinds[1])}).settings["then"]
    assert entry["hint"].startswith("depths.png sha256 ")
    embedding = {"image_embeds": np.ones(WIDTH), "guidance_scale": 1.0}
    with pytest.raises(InputError, match="hint: got none, expected an image of depths"):
        others["hint"]("", **embedding)
    with pytest.raises(InputError, match="hint: got an array of float64, expected uint8"):
        others["hint"].resolve("", **embedding, hint=np.ones((8, 8, 3)))
    with pytest.raises(InputError, match=r"hint: got .*none.png .* expected an image file"):
        others["hint"].resolve("", **embedding, hint=str(tmp_path / "none.png"))
    with pytest.raises(InputError, match=r"hint: got .*, expected none for Kandinsky 2.2: it is"):
        second.resolve("", **embedding, hint=picture)


@pytest.fixture(scope="module")
def text_decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kandinsky21")
    write_pipeline(folder / "decoder", cascade_files.text_decoder(folder / "of-decoder"))
    return first_devices(jaxdiff.load(folder / "decoder", dtype="float32"), 1)


def test_a_decoder_that_reads_texts_has_the_prompts_of_the_call(pipes, text_decoder):
    first, _ = pipes
    call = {"negative_prompt": "a ring", "seed": 3}
    got = Cascade(first, text_decoder)(PROMPT, **call, output="latent")
    own = {"image_embeds": first(PROMPT, **call).images}
    own["negative_image_embeds"] = first("a ring", **call).images
    want = text_decoder(PROMPT, **call, **own, output="latent").images
    np.testing.assert_allclose(got.images, want, atol=1e-5)
    for other in ({"negative_prompt": "a star"}, {"prompt": "a star"}):
        changed = text_decoder(**{"prompt": PROMPT, **call, **own, **other}, output="latent").images
        assert np.abs(changed - want).max() > 1e-3, other


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_hid_dim": 6}, "text_encoder: got hidden_size 10, expected 6, as the UNet has"),
        ({"cross_attention_dim": 12}, "text_encoder: got numDims 8, expected 12, as the UNet has"),
        ({"in_channels": 5}, "unet: got in_channels 5, expected 4, or 9 for inpainting"),
        (
            {"encoder_hid_dim_type": "image_proj"},
            "unet: got addition_embed_type text_image and encoder_hid_dim_type image_proj, "
            "expected text_image and text_image_proj or image and image_proj",
        ),
    ],
)
def test_a_decoder_that_does_not_fit_its_text_encoder_is_refused(tmp_path, fields, message):
    parts = cascade_files.text_decoder(tmp_path / "of-decoder", **fields)
    modules = {name: part.module for name, part in parts.components.items()}
    with pytest.raises(InputError, match=message):
        detect_family("KandinskyPipeline", modules, source="a folder")
