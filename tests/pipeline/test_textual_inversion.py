"""New words for a model: what they mean, that they go again, and what is refused."""

import jax.numpy as jnp
import numpy as np
import originals
import pytest

from jaxdiff.core.errors import InputError

DRAW = {"output": "latent", "seed": 3, "steps": 2}
VECTORS = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    return originals.write_safetensors(tmp_path / "thing.safetensors", {"emb_params": VECTORS})


@pytest.fixture(autouse=True)
def forget(single):
    yield
    single.unload_textual_inversions()


def rows(pipe, text):
    """The token vectors that the encoder begins with."""
    ids = pipe._tokenizers.first.ids(text)
    return np.asarray(pipe.text_encoder.text_model.embeddings.token_embedding(jnp.array(ids)))


def test_a_word_means_its_vectors(single, file):
    before = rows(single, "a red star")
    assert single.load_textual_inversion(file) == "thing"
    assert single.textual_inversion_tokens == ("thing",)
    got = rows(single, "a thing star")
    np.testing.assert_array_equal(got[1:3], VECTORS)
    np.testing.assert_array_equal(got[[0, 3]], before[[0, 2]])


def test_it_changes_images_and_goes_without_a_trace(single, file):
    plain, before = (single(p, **DRAW).images for p in ("a star", "a thing star"))
    single.load_textual_inversion(file)
    steps = [p for p in single.stages._programs.values() if p.compilations]
    counts = [p.compilations for p in steps]
    after = single("a thing star", **DRAW).images
    np.testing.assert_array_equal(single("a star", **DRAW).images, plain)
    assert np.abs(after - before).max() > 1e-3
    # The text encoder is compiled for the longer table, and nothing else.
    assert sum(p.compilations for p in steps) - sum(counts) == 1
    single.unload_textual_inversions()
    np.testing.assert_array_equal(single("a thing star", **DRAW).images, before)


def write_bundle(folder, **more):
    """A LoRA that brings a token along."""
    tensors = {"bundle_emb.sks.string_to_param.*": VECTORS, "lora_unet_conv_out.diff_b": np.ones(4)}
    tensors = {name: np.asarray(array, np.float32) for name, array in (tensors | more).items()}
    return originals.write_safetensors(folder / "style.safetensors", tensors)


def test_a_word_comes_and_goes_with_a_lora(single, file, tmp_path):
    before = rows(single, "a red star")
    single.load_textual_inversion(file)
    single.load_lora(write_bundle(tmp_path))
    assert single.textual_inversion_tokens == ("thing", "sks")
    got = rows(single, "a sks star")
    np.testing.assert_array_equal(got[1:3], VECTORS)
    single.unload_loras()
    assert single.textual_inversion_tokens == ("thing",)
    np.testing.assert_array_equal(rows(single, "a thing star")[1:3], VECTORS)
    single.unload_textual_inversions()
    np.testing.assert_array_equal(rows(single, "a red star"), before)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bundle_emb.x.clip_l": VECTORS[:, :7]}, r"clip_l: got shape \(2, 7\), expected \(n, 8\)"),
        (
            {"bundle_emb.x.t5": VECTORS},
            r"bundle_emb.x: got 1 tensors \(t5\), expected one embedding",
        ),
        ({"bundle_emb.circle</w>.emb_params": VECTORS}, "which the tokenizer already has"),
        ({"lora_unet_conv_out.diff": VECTORS}, "conv_out.diff, full"),
    ],
)
def test_a_lora_with_a_word_that_does_not_fit_changes_nothing(single, tmp_path, more, message):
    bias = np.asarray(single.unet.conv_out.bias)
    with pytest.raises(InputError, match=message):
        single.load_lora(write_bundle(tmp_path, **more))
    assert (single.textual_inversion_tokens, single.loras) == ((), {})
    np.testing.assert_array_equal(single.unet.conv_out.bias, bias)


@pytest.mark.parametrize(
    "names", [["string_to_param.*", "string_to_token.*"], ["string_to_param.cat"], ["clip_l"]]
)
def test_old_files(single, tmp_path, names):
    """The paper's, whose ids count for nothing, and a file of one encoder's name."""
    tensors = dict.fromkeys(names[:1], VECTORS) | dict.fromkeys(
        names[1:], np.array(265, np.float32)
    )
    path = originals.write_safetensors(tmp_path / "cat.safetensors", tensors)
    assert single.load_textual_inversion(path) == "cat"
    np.testing.assert_array_equal(rows(single, "cat"), VECTORS)


def test_another_name(single, file):
    assert single.load_textual_inversion(file, token="<cat>") == "<cat>"
    np.testing.assert_array_equal(rows(single, "<cat>"), VECTORS)


def test_a_file_of_diffusers_and_a_single_vector(single, tmp_path):
    path = originals.write_safetensors(tmp_path / "x.safetensors", {"<dog>": VECTORS[0]})
    assert single.load_textual_inversion(path) == "<dog>"
    np.testing.assert_array_equal(rows(single, "<dog>"), VECTORS[:1])


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"a": VECTORS[:, :7]}, {}, r"a: got shape \(2, 7\), expected \(n, 8\)"),
        ({"a": VECTORS, "b": VECTORS}, {}, "got 2 tensors"),
        (
            {"clip_l": VECTORS, "clip_g": VECTORS[:1]},
            {"word": "two words"},
            "token: got 'two words'",
        ),
        ({"a": VECTORS}, {"token": "circle</w>"}, "which the tokenizer already has"),
    ],
)
def test_what_does_not_fit_is_refused(single, tmp_path, tensors, options, message):
    path = originals.write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(InputError, match=message):
        single.load_textual_inversion(path, **options)
    assert single.textual_inversion_tokens == ()


@pytest.mark.parametrize("name", ["word.png", "word.webp"])
def test_an_image_is_no_textual_inversion(single, tmp_path, name):
    (tmp_path / name).write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"got an image; .* expected a \.pt or \.safetensors file"):
        single.load_textual_inversion(tmp_path / name)


@pytest.mark.parametrize(("name", "token"), [("tensor", "word"), ("tensors", "tensors")])
def test_a_tensor_without_a_name_has_the_files(single, tmp_path, name, token):
    path = originals.write_safetensors(tmp_path / "word.safetensors", {name: VECTORS})
    assert single.load_textual_inversion(path) == token


def test_a_folder_has_no_place_for_them(single, file, tmp_path):
    single.load_textual_inversion(file)
    with pytest.raises(InputError, match="got a model with the textual inversions thing"):
        single.save(tmp_path / "x")
