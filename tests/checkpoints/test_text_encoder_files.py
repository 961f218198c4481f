"""Text encoders in files of their own: a model of such files is the folder of the same model."""

import dataclasses
import json
import pathlib
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import originals
import pytest
import safetensors.numpy
import tiny
import transformer_files as models

import jaxdiff
from jaxdiff.checkpoints import layout_stable_diffusion
from jaxdiff.checkpoints.clip_vocabulary import END, clip_tokenizer
from jaxdiff.checkpoints.loading import lazy_tensors
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.checkpoints.single_file_layouts import UNET
from jaxdiff.checkpoints.text_encoder_files import open_text_encoders
from jaxdiff.checkpoints.tokenizers import read_tokenizer
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.families.detection import family_of
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.training.config import DiffusionObjective

TOKENIZER = pathlib.Path(__file__).parents[1] / "data/t5_tokenizer"
WORDS = 256  # rows of T5's embedding, at least as many as its tokenizer has
IMAGE = {"height": 16, "width": 16, "steps": 1, "output": "numpy", "seed": 3}
# Names of the files as they are published, by component.
FILES = {
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    "chroma": {"text_encoder": "t5xxl"},
    "sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
}


def parts_of(name, place):
    """The pipeline of a family, whose T5 has a tokenizer of T5."""
    parts = models.components(name, place)
    own = {n: c for n, c in parts.components.items() if "T5" in type(c.module).__name__}
    (encoder,) = own
    tokenizer = encoder.replace("text_encoder", "tokenizer")
    t5 = models._t5(WORDS)
    read = read_tokenizer(TOKENIZER, class_name="T5Tokenizer")
    return dataclasses.replace(
        parts,
        components={**parts.components, encoder: t5},
        tokenizers={**parts.tokenizers, tokenizer: read},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a family and the files of its components, each written once."""
    made = {}

    def write(name):
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            parts = parts_of(name, place)
            write_pipeline(place / "folder", parts)
            whole = place / "whole.safetensors"
            assert main.run("convert", [str(place / "folder"), str(whole)]) == 0
            files = place / "files"
            files.mkdir()
            shutil.copy(TOKENIZER / "spiece.model", files)
            tensors = models.arrays(whole)
            prefixes = {"network": UNET, "vae": "first_stage_model."}
            names = FILES[name].values()
            prefixes |= {each: f"text_encoders.{each}.transformer." for each in names}
            for each, prefix in prefixes.items():
                own = below(tensors, prefix)
                if each == "clip_l":  # which CLIP's files have, and no model here reads
                    own["text_projection.weight"] = np.ones((models.HEAD,) * 2, np.float32)
                    own["logit_scale"] = np.float32(4.6)
                originals.write_safetensors(files / f"{each}.safetensors", own)
            made[name] = place / "folder", files, whole
        return made[name]

    return write


def below(tensors, prefix):
    return {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)}


def texts(files, *names):
    return [str(files / f"{name}.safetensors") for name in names]


def assert_same(got, wanted):
    """The same weights, configs, tokenizers' texts and schedule."""
    assert got.components.keys() == wanted.components.keys()
    assert got.tokenizers.keys() == wanted.tokenizers.keys()
    assert got.class_name == wanted.class_name
    for name, component in wanted.components.items():
        own, config = got.components[name].module, component.module.config
        if name == "vae":  # whose own file does not say what it was trained with
            config = dataclasses.replace(config, sample_size=own.config.sample_size)
        assert own.config == config, name
        tensors, expected = lazy_tensors(own), lazy_tensors(component.module)
        assert tensors.keys() == expected.keys()
        for key, tensor in expected.items():
            np.testing.assert_array_equal(tensors[key].fetch(), tensor.fetch(), err_msg=key)


def generate(source, **options):
    pipe = tiny.first_devices(jaxdiff.load(source, dtype="float32", **options), 1)
    return pipe("a small red circle", **IMAGE).images


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FILES)
def test_files_without_a_base_are_the_folder(model, name):
    folder, files, _ = model(name)
    given = {"vae": files / "vae.safetensors", "text_encoders": texts(files, *FILES[name].values())}
    network = files / "network.safetensors"
    parts = read_model(network, **given)
    assert_same(parts, read_pipeline(folder))
    images = generate(network, **given)
    np.testing.assert_array_equal(images, generate(folder))
    assert np.ptp(images) > 10


def test_order_prefixes_and_whole_models_do_not_matter(model, tmp_path):
    """Any order; all of them below prefixes in one file, or in that of a whole model."""
    folder, files, whole = model("sd3")
    wanted = read_pipeline(folder)
    network, given = files / "network.safetensors", {"vae": files / "vae.safetensors"}
    turned = texts(files, "t5xxl", "clip_g", "clip_l")
    assert_same(read_model(network, **given, text_encoders=turned), wanted)
    tensors = models.arrays(whole)
    one = {n: a for n, a in tensors.items() if n.startswith("text_encoders.")}
    shutil.copy(TOKENIZER / "spiece.model", tmp_path)
    for more in (one, tensors | {"text_encoders.t5xxl.logit_scale": np.float32(1.0)}):
        path = originals.write_safetensors(tmp_path / "texts.safetensors", more)
        assert_same(read_model(network, **given, text_encoders=[path]), wanted)
        assert_same(read_model(network, **given, text_encoders=path), wanted)


def test_a_base_gives_the_rest(model, tmp_path):
    """Also the tokenizer of a T5 that is in a file; a text encoder of the file is replaced."""
    folder, files, whole = model("sd3")
    wanted = read_pipeline(folder)
    network = files / "network.safetensors"
    alone = tmp_path / "t5.safetensors"
    shutil.copy(files / "t5xxl.safetensors", alone)
    for given in ([alone], texts(files, "clip_g"), texts(files, "clip_l")):
        assert_same(read_model(network, base=folder, text_encoders=given), wanted)
    tensors = models.arrays(files / "clip_g.safetensors")
    name = "text_model.final_layer_norm.bias"
    other = originals.write_safetensors(
        tmp_path / "other.safetensors", tensors | {name: tensors[name] + 1}
    )
    for path in (network, whole):
        parts = read_model(path, base=folder, text_encoders=[other])
        got = lazy_tensors(parts.components["text_encoder_2"].module)[name].fetch()
        np.testing.assert_array_equal(got, tensors[name] + 1)


def test_t5_is_optional_in_sd3(model):
    _, files, _ = model("sd3")
    network, given = files / "network.safetensors", {"vae": files / "vae.safetensors"}
    with pytest.warns(UserWarning, match=r"got no text_encoder_3: .*--text-encoders FILE"):
        parts = read_model(network, **given, text_encoders=texts(files, "clip_l", "clip_g"))
    assert parts.absent == ("text_encoder_3", "tokenizer_3")


@pytest.mark.parametrize("scaled", [False, True])
def test_8_bit_floats(model, tmp_path, scaled):
    """Plain, and with ComfyUI's scales and marks."""
    _, files, _ = model("flux")
    network, eight, plain = files / "network.safetensors", {}, {}
    scale = np.array(0.03 if scaled else 1.0, np.float32)
    for key, values in models.arrays(files / "t5xxl.safetensors").items():
        eight[key] = plain[key] = values
        if values.ndim == 2 and key.startswith("encoder."):
            eight[key] = (values / scale).astype(ml_dtypes.float8_e4m3fn)
            plain[key] = eight[key].astype(np.float32) * scale
            if scaled:
                eight[f"{key.removesuffix('.weight')}.scale_weight"] = scale
    if scaled:
        eight["scaled_fp8"] = np.zeros(0, ml_dtypes.float8_e4m3fn)
    shutil.copy(TOKENIZER / "spiece.model", tmp_path)
    safetensors.numpy.save_file(eight, tmp_path / "eight.safetensors")
    originals.write_safetensors(tmp_path / "plain.safetensors", plain)
    got, wanted = (
        read_model(
            *(network, jnp.float32),
            vae=files / "vae.safetensors",
            text_encoders=[files / "clip_l.safetensors", tmp_path / f"{name}.safetensors"],
        )
        for name in ("eight", "plain")
    )
    assert_same(got, wanted)


def test_the_tokenizer_of_t5(model, tmp_path, capsys):
    """Beside its file as spiece.model or tokenizer.json, in the base, else nowhere."""
    folder, files, _ = model("chroma")
    network, given = files / "network.safetensors", {"vae": files / "vae.safetensors"}
    alone = tmp_path / "t5.safetensors"
    shutil.copy(files / "t5xxl.safetensors", alone)
    with pytest.raises(InputError, match=r"t5\.safetensors: got no tokenizer, .*base=") as error:
        read_model(network, **given, text_encoders=[alone])
    place = tmp_path / "spiece.model"
    assert f"T5's spiece.model at {place} (0.8 MB: tokenizer/spiece.model of" in str(error.value)
    pipe = jaxdiff.load(folder, dtype="float32")
    pipe.tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "tokenizer.json", tmp_path)
    images = generate(network, **given, text_encoders=[alone])
    np.testing.assert_array_equal(images, generate(folder))
    other = clip_tokenizer(END)
    raw = {"model": {"type": "BPE", "vocab": json.loads(other.files["vocab.json"])}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"tokenizer\.json: got a tokenizer of kind 'BPE'"):
        read_model(network, **given, text_encoders=[alone])
    shutil.copy(TOKENIZER / "spiece.model", tmp_path)  # comes first
    parts = read_model(network, **given, text_encoders=[alone])
    assert parts.tokenizers["tokenizer"].files.keys() == {"spiece.model"}


def test_what_does_not_fit(model, tmp_path):
    _, files, _ = model("flux")
    sd3 = model("sd3")[1]
    network = files / "network.safetensors"
    t5, clip = texts(files, "t5xxl", "clip_l")
    wide = texts(sd3, "clip_g")[0]

    def fails(match, *given, source=network):
        with pytest.raises(InputError, match=match):
            read_model(source, vae=files / "vae.safetensors", text_encoders=given)

    fails(r"got no text_encoder, expected .*--base FOLDER.*--text-encoders FILE", t5)
    fails(
        r"clip_g\.safetensors \(CLIP of width 128\), expected CLIP of width 64 for text_enc", wide
    )
    copy = shutil.copy(clip, tmp_path / "copy.safetensors")
    fails(r"clip_l\.safetensors and .*copy\.safetensors for text_encoder, expected one", clip, copy)
    fails(r"vae\.safetensors, in which there is no text encoder", files / "vae.safetensors")
    fails(r"nowhere\.safetensors \(no such file\)", tmp_path / "nowhere.safetensors")
    fails(r"\(a folder\), expected files with text encoders", tmp_path)
    shard = shutil.copy(t5, tmp_path / "model-00001-of-00002.safetensors")
    fails(r"00002\.safetensors, one of several files, expected the \.index\.json", shard)
    fails(r"clip_l\.safetensors for .*folder, expected a single file", clip, source=model("sd3")[0])
    bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    more = models.arrays(pathlib.Path(t5)) | {bias: np.zeros((32, 2), np.float32)}
    fails(r"\(UMT5\)", originals.write_safetensors(tmp_path / "umt5.safetensors", more))
    missing = models.arrays(pathlib.Path(t5))
    del missing["encoder.final_layer_norm.weight"]
    originals.write_safetensors(tmp_path / "x.safetensors", missing)
    shutil.copy(TOKENIZER / "spiece.model", tmp_path)
    fails(r"x\.safetensors: missing tensors: got 1", clip, tmp_path / "x.safetensors")
    narrow = clip_file(tmp_path / "narrow.safetensors", 32)
    fails(
        r"narrow\.safetensors and .*clip_g\.safetensors of widths 32 and 128, expected widths that "
        "add up to 192",
        wide,
        narrow,
        source=sd3 / "network.safetensors",
    )


def clip_file(path, width, layers=1, **options):
    """A file with a CLIP in the names of transformers, and its weights."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=16,
        projection_dim=originals.WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    module = tiny.random_component(CLIPTextModel, config, seed=width, **options).module
    tensors = {name: tensor.fetch() for name, tensor in lazy_tensors(module).items()}
    return originals.write_safetensors(path, tensors)


def test_a_unet_with_clip_in_the_names_of_transformers(tmp_path):
    """Stable Diffusion XL, whose second text encoder has other names in whole files."""
    tensors = originals.original_tensors("sdxl", originals.components("sdxl"))
    alone = {n: a for n, a in tensors.items() if not n.startswith("conditioner.")}
    path = originals.write_safetensors(tmp_path / "unet.safetensors", alone)
    given = {
        "text_encoder_2": clip_file(tmp_path / "g.safetensors", 96, with_projection=True),
        "text_encoder": clip_file(tmp_path / "l.safetensors", 32),
    }
    parts = read_model(path, text_encoders=list(given.values()))
    assert family_of(parts, "x").name == "Stable Diffusion XL"
    for name, file in given.items():
        got, wanted = lazy_tensors(parts.components[name].module), models.arrays(file)
        assert got.keys() == wanted.keys()
        for key, values in wanted.items():
            np.testing.assert_array_equal(got[key].fetch(), values, err_msg=key)
    acts = [parts.components[name].module.config.hidden_act for name in sorted(given)]
    assert acts == ["quick_gelu", "gelu"]


def test_layers_that_stable_diffusion_2_does_not_read(tmp_path):
    """OpenCLIP-H has 24, of which folders and whole files give 23."""
    path = clip_file(tmp_path / "h.safetensors", 8, layers=24, with_projection=True)
    (file,) = open_text_encoders([path])
    read = file.read(layout_stable_diffusion.SD2.components[2])
    dropped = file.tensors.keys() - read.keys()
    assert "text_projection.weight" in dropped
    assert {name.split(".")[3] for name in dropped - {"text_projection.weight"}} == {"23"}
    assert len(dropped) == 1 + (len(file.tensors) - 5) // 24


def test_generate_and_the_settings_of_its_images(model, tmp_path, capsys):
    _, files, _ = model("chroma")
    network, (t5,) = files / "network.safetensors", texts(files, "t5xxl")
    size = ("--height", "16", "--width", "16", "--steps", "1")
    both = ["--model", str(network), "--vae", str(files / "vae.safetensors")]
    command = ["a star", *both, *size, "--output", str(tmp_path / "a"), "--text-encoders"]
    assert main.run("generate", ["a star", *both, "--output", str(tmp_path / "a")]) == 2
    assert "--text-encoders FILE ..." in capsys.readouterr().err
    assert main.run("generate", [*command, t5]) == 0
    (path,) = (tmp_path / "a").glob("*.png")
    again = ["--from", str(path), *both, "--output", str(tmp_path / "b")]
    capsys.readouterr()
    assert main.run("generate", [*again, "--text-encoders", t5]) == 0
    assert [p.read_bytes() for p in (tmp_path / "b").glob("*.png")] == [path.read_bytes()]
    other = tmp_path / "t5xxl.safetensors"
    tensors = models.arrays(pathlib.Path(t5))
    shared = tensors["shared.weight"]
    originals.write_safetensors(other, tensors | {"shared.weight": shared[::-1].copy()})
    shutil.copy(TOKENIZER / "spiece.model", tmp_path)
    assert main.run("generate", [*command, str(other)]) == 0
    assert len(list((tmp_path / "a").glob("*.png"))) == 2  # nothing is there already


def test_a_training_starts_from_the_folder_that_convert_makes(model, tmp_path):
    folder, files, whole = model("chroma")
    network, made = str(files / "network.safetensors"), str(tmp_path / "made")
    for source, lacking in ((network, "vae, text_encoder"), (str(whole), "tokenizer, which")):
        with pytest.raises(InputError) as error:
            load_base_model(DiffusionObjective(pipeline=source))
        assert f"{source}: got no {lacking}" in str(error.value)
        assert f"a folder, which `jaxdiff convert {source} FOLDER --base BASE`" in str(error.value)
    given = ("--vae", str(files / "vae.safetensors"), "--text-encoders", *texts(files, "t5xxl"))
    assert main.run("convert", [network, made, *given]) == 0
    assert load_base_model(DiffusionObjective(pipeline=made)).family.name == "Chroma"
    assert_same(read_pipeline(made), read_pipeline(folder))


def test_inspect_and_loading_name_the_option(model, tmp_path, capsys):
    _, files, _ = model("flux")
    assert main.run("inspect", [str(files / "network.safetensors")]) == 0
    found = capsys.readouterr().out
    give = "a model with the rest (--base FOLDER, base=...), or text encoders in files of their own"
    assert f"no text_encoder: loading needs {give} (--text-encoders FILE ..." in found
    with pytest.raises(InputError, match=r"got a text encoder \(T5EncoderModel\), .*--text-enc"):
        read_model(files / "t5xxl.safetensors")
