"""VAEs of their own: found in every layout, put into models, described and converted."""

import dataclasses
import pathlib
import warnings

import numpy as np
import originals
import pytest
import tiny

import jaxdiff
from jaxdiff.checkpoints import hub
from jaxdiff.checkpoints.components import read_component, write_component
from jaxdiff.checkpoints.description import describe
from jaxdiff.checkpoints.jsonfiles import read_object, write_object
from jaxdiff.checkpoints.loading import lazy_tensors
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.safetensors import read_table, read_tensor
from jaxdiff.checkpoints.single_file import write_single_file
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny
from jaxdiff.models.build import param_dict
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig

PREFIX = "first_stage_model."
TINY = tiny.TAESD


@pytest.fixture(scope="module")
def sd1():
    """The tensors of a whole checkpoint, and of its VAE without prefix."""
    whole = originals.original_tensors("sd1", originals.components("sd1"))
    vae = {k.removeprefix(PREFIX): v for k, v in whole.items() if k.startswith(PREFIX)}
    return {k: v for k, v in whole.items() if not k.startswith(PREFIX)}, vae


@pytest.fixture(scope="module")
def bare(sd1, tmp_path_factory):
    """A checkpoint without a VAE."""
    return originals.write_safetensors(tmp_path_factory.mktemp("bare") / "x.safetensors", sd1[0])


def fetched(module):
    return {name: tensor.fetch() for name, tensor in lazy_tensors(module).items()}


def read_with(model, vae, **options):
    """The VAE of `model` with `vae`, as shapes or weights."""
    return read_model(model, vae=vae, only={"vae"}, **options).components["vae"].module


def assert_same(got, wanted):
    got, wanted = param_dict(got), param_dict(wanted)
    assert got.keys() == wanted.keys()
    for path, values in wanted.items():
        np.testing.assert_array_equal(got[path], values, err_msg=path)


def with_attention(vae, *names):
    """The tensors with other names for q, k, v and proj_out, which are matrices."""
    found = {}
    for name, values in vae.items():
        for old, new in zip(("q", "k", "v", "proj_out"), names, strict=True):
            if f"attn_1.{old}." in name:
                name = name.replace(f"attn_1.{old}.", f"attn_1.{new}.")
                values = values[..., 0, 0] if values.ndim == 4 else values
        found[name] = values
    return found


SPELLINGS = {
    "bare": lambda vae, _: vae,
    "prefix": lambda vae, _: {PREFIX + name: v for name, v in vae.items()},
    "short prefix": lambda vae, _: {f"vae.{name}": v for name, v in vae.items()},
    "diffusers": lambda _, module: fetched(module),
    "trained": lambda vae, _: (
        vae | {name: np.zeros(2, np.float32) for name in ("loss.logvar", "model_ema.decay")}
    ),
    "trained, prefix": lambda vae, _: {
        PREFIX + name: values for name, values in SPELLINGS["trained"](vae, None).items()
    },
    "converters of 2023": lambda vae, _: with_attention(vae, "to_q", "to_k", "to_v", "to_out.0"),
    "old names": lambda vae, _: with_attention(vae, "query", "key", "value", "proj_attn"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_files_of_every_spelling(sd1, bare, tmp_path, spelling):
    wanted = originals.components("sd1")["vae"].module
    tensors = SPELLINGS[spelling](sd1[1], wanted)
    path = originals.write_safetensors(tmp_path / "vae.safetensors", tensors)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = read_with(bare, path)
    passed_over = f"{path}: got tensors that are not read: 1 of averaged weights (EMA), 1 of losses"
    expected = [passed_over] if spelling.startswith("trained") else []
    assert [str(each.message) for each in caught] == expected
    assert got.config == dataclasses.replace(wanted.config, sample_size=512)
    assert_same(got, wanted)
    found = describe(path)
    assert (found.family, found.parts[0].class_name) == (
        "VAE of 4 latent channels",
        "AutoencoderKL",
    )


def test_attention_of_2023_in_a_whole_checkpoint(sd1, tmp_path):
    vae = SPELLINGS["converters of 2023"](sd1[1], None)
    whole = sd1[0] | {PREFIX + name: values for name, values in vae.items()}
    path = originals.write_safetensors(tmp_path / "x.safetensors", whole)
    assert_same(
        read_model(path, only={"vae"}).components["vae"].module,
        originals.components("sd1")["vae"].module,
    )


def test_a_checkpoint_without_a_vae_says_what_to_give(bare, sd1, tmp_path):
    with pytest.raises(InputError, match=r"got no tensors first_stage.*a VAE of its own \(--vae"):
        jaxdiff.load(bare)
    assert [part.name for part in describe(bare).parts] == ["unet", "text_encoder"]
    vae = originals.write_safetensors(tmp_path / "vae.safetensors", sd1[1])
    with pytest.raises(InputError, match="got a VAE, expected a whole checkpoint"):
        jaxdiff.load(vae)
    assert type(jaxdiff.load(bare, vae=vae).vae) is AutoencoderKL
    encoder, decoder = tiny.taesd_halves()
    joined = {f"taesd_encoder.{name}": values for name, values in encoder.items()}
    for tensors in (encoder, decoder, joined):
        path = originals.write_safetensors(tmp_path / "taesd_encoder.safetensors", tensors)
        with pytest.raises(InputError, match="got a VAE, expected a whole checkpoint"):
            jaxdiff.load(path)


def test_a_folder_without_a_vae(tmp_path):
    folder = tiny.write_tiny(tmp_path / "model")
    (folder / "vae").rename(tmp_path / "vae")
    with pytest.raises(InputError, match=r"got no vae/, expected it, or a VAE of its own \(--vae"):
        jaxdiff.load(folder)
    wanted = jaxdiff.load(folder, vae=tmp_path / "vae")
    write_object(
        folder / "model_index.json",
        read_object(folder / "model_index.json") | {"vae": [None, None]},
    )
    with pytest.raises(InputError, match="got a model without a VAE, expected one, or a VAE of"):
        jaxdiff.load(folder)
    pipe = jaxdiff.load(folder, vae=str(tmp_path / "vae"))
    assert pipe.fingerprint == wanted.fingerprint
    pipe.save(tmp_path / "saved")
    assert jaxdiff.load(tmp_path / "saved").fingerprint == wanted.fingerprint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder whose own VAE has a scaling factor of 0.7."""
    return tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def vae_folder(model, tmp_path):
    """A VAE of its own whose config says a scaling factor of 0.7, as that of `model`."""
    config = read_object(model / "vae/config.json") | {"scaling_factor": 0.7}
    part = tiny.random_component(AutoencoderKL, from_config(config), seed=9)
    write_component(tmp_path / "vae", part)
    return tmp_path / "vae"


def from_config(config):
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return originals.AutoencoderKLConfig(**fields)


def test_where_a_folder_has_it(model, vae_folder, tmp_path):
    wanted = read_with(model, vae_folder)
    weights = vae_folder / "diffusion_pytorch_model.safetensors"
    assert_same(read_with(model, weights), wanted)  # its config.json counts: groups of 4
    whole = tiny.write_tiny(tmp_path / "whole")
    own = read_model(whole).components["vae"].module
    assert_same(read_with(model, whole), own)
    (whole / "model_index.json").unlink()
    assert_same(read_with(model, whole), own)
    assert_same(read_with(model, vae_folder, variant=None), wanted)


@pytest.mark.parametrize(
    ("said", "own", "factor"),
    [
        (None, 0.7, 0.7),
        (None, None, 0.18215),
        (0.5, None, 0.5),
        (0.13025, None, 0.13025),
        (0.3611, None, 0.3611),
    ],
)
def test_the_scaling_factor(model, vae_folder, tmp_path, said, own, factor):
    """The file's own counts, else that of the model's VAE, else that of the family."""
    change(vae_folder, scaling_factor=said)
    folder = tiny.write_tiny(tmp_path / "model")
    change(folder / "vae", scaling_factor=own)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_with(folder, vae_folder).config.scaling_factor == factor
    said = ["".join(str(each.message).partition("scales")[1:]) for each in caught]
    wrong = (
        f"scales latents by {factor}, another family's factor, expected 0.18215 as the model has"
    )
    assert said == ([f"{wrong}; images may be wrong"] if factor in (0.13025, 0.3611) else [])


def change(folder, **values):
    """config.json with these values, without those that are None."""
    config = read_object(folder / "config.json") | values
    write_object(folder / "config.json", {k: v for k, v in config.items() if v is not None})


def test_the_scaling_factor_of_sdxl(tmp_path, sd1):
    parts = originals.components("sdxl")
    tensors = originals.original_tensors("sdxl", parts)
    model = {k: v for k, v in tensors.items() if not k.startswith(PREFIX)}
    path = originals.write_safetensors(tmp_path / "xl.safetensors", model)
    vae = originals.write_safetensors(tmp_path / "vae.safetensors", sd1[1])
    assert read_with(path, vae).config.scaling_factor == 0.13025


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "none",
            r"vae: got .*none \(no such file or folder\), expected a file or folder with a VAE",
        ),
        ("model", r"vae: got .*without vae/ or config\.json, expected a VAE"),
        ("lora.safetensors", "vae: got .*in which there is none, expected a VAE"),
        ("half/taesd_decoder.safetensors", r"expected taesd_encoder\.safetensors beside it"),
        ("wide.safetensors", "with 16 latent channels, expected 4 as the UNet has"),
        ("other", "class of the VAE: got 'AsymmetricAutoencoderKL', expected one of AutoencoderKL"),
    ],
)
def test_what_is_no_vae_or_does_not_fit(model, vae_folder, tmp_path, name, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "half").mkdir()
    one = np.zeros((1, 1), np.float32)
    originals.write_safetensors(tmp_path / "lora.safetensors", {"x.lora_up.weight": one})
    _, decoder = tiny.taesd_halves()
    originals.write_safetensors(tmp_path / "half/taesd_decoder.safetensors", decoder)
    wide = tiny.random_component(AutoencoderTiny, dataclasses.replace(TINY, latent_channels=16))
    originals.write_safetensors(tmp_path / "wide.safetensors", fetched(wide.module))
    vae_folder.rename(tmp_path / "other")
    change(tmp_path / "other", _class_name="AsymmetricAutoencoderKL")
    with pytest.raises(InputError, match=message):
        read_model(model, vae=tmp_path / name)


@pytest.mark.parametrize("form", ["diffusers", "folder", "halves", "joined"])
def test_taesd(model, tmp_path, form):
    part = tiny.random_component(AutoencoderTiny, TINY)
    encoder, decoder = tiny.taesd_halves()
    joined = {f"taesd_encoder.{k}": v for k, v in encoder.items()}
    joined |= {f"taesd_decoder.{k}": v for k, v in decoder.items()}
    files = {
        "diffusers": ("taesd.safetensors", fetched(part.module)),
        "joined": ("taesd.safetensors", joined),
        "halves": ("taesd_decoder.safetensors", decoder),
    }
    path = tmp_path / "taesd"
    if form == "folder":
        write_component(path, part)
        change(path, block_out_channels=[8, 8])  # as diffusers adds
    else:
        name, tensors = files[form]
        path = originals.write_safetensors(tmp_path / name, tensors)
        originals.write_safetensors(tmp_path / "taesd_encoder.safetensors", encoder)
        found = describe(path)
        assert found.parts[0].class_name == "AutoencoderTiny"
        assert found.parts[0].tensors == len(param_dict(part.module))
    got = read_with(model, path)
    assert got.config == TINY  # not the model's scaling factor
    assert_same(got, part.module)


def test_images_with_taesd(model, tmp_path):
    """To text, from images, saved and trained on."""
    write_component(tmp_path / "taesd", tiny.random_component(AutoencoderTiny, TINY))
    pipe = jaxdiff.load(model, vae=tmp_path / "taesd")
    out = pipe("a red star", steps=2)
    latents = pipe("a red star", steps=2, output="latent").images
    np.testing.assert_array_equal(pipe.decode_latents(latents)[0], np.asarray(out.images[0]))
    again = pipe("a red star", image=out.images[0], strength=0.5, steps=2)
    assert again.images[0].size == (16, 16)
    pipe.save(tmp_path / "saved")
    assert jaxdiff.load(tmp_path / "saved").fingerprint == pipe.fingerprint
    with pytest.raises(InputError, match="vae: got AutoencoderTiny, expected AutoencoderKL"):
        write_single_file(tmp_path / "x.safetensors", dataclasses.replace(pipe.parts))


def test_latents_with_a_mean_are_not_those_of_taesd(model, tmp_path):
    write_component(tmp_path / "taesd", tiny.random_component(AutoencoderTiny, TINY))
    folder = tiny.write_tiny(tmp_path / "model")
    change(folder / "vae", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(InputError, match=r"vae: got a TAESD, .*latents_mean"):
        read_model(folder, vae=tmp_path / "taesd")


def test_convert_there_and_back(sd1, tmp_path, capsys):
    path = originals.write_safetensors(tmp_path / "x.safetensors", sd1[1])
    steps = [
        (path, tmp_path / "folder", "--scaling-factor", "0.13025"),
        (tmp_path / "folder", tmp_path / "again.safetensors"),
        (path, tmp_path / "flax", "--format", "flax"),
        (tmp_path / "flax", tmp_path / "third.safetensors", "--dtype", "float16"),
    ]
    for step in steps:
        assert main.run("convert", list(map(str, step))) == 0, capsys.readouterr().err
    assert "folder: AutoencoderKL, scaling factor 0.13025, " in capsys.readouterr().out
    assert read_object(tmp_path / "folder/config.json")["scaling_factor"] == 0.13025
    for name, dtype in (("again", np.float32), ("third", np.float16)):
        table = read_table(tmp_path / f"{name}.safetensors")
        got = {n: read_tensor(e) for n, e in table.items()}
        assert got.keys() == sd1[1].keys()
        for key, values in sd1[1].items():
            np.testing.assert_array_equal(got[key], values.astype(dtype), err_msg=key)
    assert describe(tmp_path / "folder").family == "AutoencoderKL"


def test_attention_in_the_stages(tmp_path, capsys):
    """The original code counts the decoder's stages from the finest; so does its `up`."""
    config = AutoencoderKLConfig(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    component = tiny.random_component(AutoencoderKL, config, seed=4)
    write_component(tmp_path / "vae", component)
    for step in (("vae", "x.safetensors"), ("x.safetensors", "again")):
        paths = [str(tmp_path / name) for name in step]
        assert main.run("convert", paths) == 0, capsys.readouterr().err
    table = read_table(tmp_path / "x.safetensors")
    attention = {name.rsplit(".", 2)[0] for name in table if "attn" in name}
    places = {"encoder.down.1.attn.0", "decoder.up.1.attn.0", "decoder.up.1.attn.1"}
    assert attention == places | {"encoder.mid.attn_1", "decoder.mid.attn_1"}
    for place in places:
        parts = {n.removeprefix(f"{place}.") for n in table if n.startswith(f"{place}.")}
        modules = ("norm", "q", "k", "v", "proj_out")
        assert parts == {f"{m}.{leaf}" for m in modules for leaf in ("weight", "bias")}
        assert table[f"{place}.q.weight"].shape == (64, 64, 1, 1)
    again = read_component(tmp_path / "again").module
    assert again.config == dataclasses.replace(config, sample_size=512)
    assert_same(again, component.module)
    with pytest.warns(UserWarning, match="AutoencoderKL: (down|up)_block_types is"):
        write_component(tmp_path / "flax", component, flax=True)


def test_convert_gives_a_model_its_vae(sd1, bare, tmp_path, capsys):
    vae = originals.write_safetensors(tmp_path / "vae.safetensors", sd1[1])
    whole = tmp_path / "whole.safetensors"
    assert main.run("convert", [str(bare), str(whole), "--vae", str(vae)]) == 0
    table = read_table(whole)
    got = {k.removeprefix(PREFIX): read_tensor(e) for k, e in table.items() if PREFIX in k}
    assert got.keys() == sd1[1].keys()
    for name, values in sd1[1].items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)
    assert main.run("convert", [str(bare), str(whole), "--vae", str(tmp_path / "none")]) == 2
    assert "convert: vae: got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["taesd", "x.safetensors"], "format: got original for a TAESD, expected diffusers"),
        (["taesd", "x", "--scaling-factor", "2"], "scaling_factor: got 2.0 for .*, which has one"),
        (
            ["taesd", "x", "--prediction-type", "epsilon"],
            "prediction_type: got 'epsilon' for a VAE",
        ),
        (["model", "x", "--scaling-factor", "2"], "scaling_factor: got 2.0 for a whole model"),
        (
            ["bare", "x.safetensors", "--scaling-factor", "0.13"],
            r"scaling_factor: got 0.13 for .*x\.safetensors, expected none: a VAE file of the orig",
        ),
        (["bare", "x", "--vae", "y"], "vae: got 'y' for a VAE, expected no vae"),
    ],
)
def test_conversions_that_cannot_be(model, sd1, tmp_path, capsys, arguments, message):
    write_component(tmp_path / "taesd", tiny.random_component(AutoencoderTiny, TINY))
    bare = originals.write_safetensors(tmp_path / "bare.safetensors", sd1[1])
    sources = {"model": model, "taesd": tmp_path / "taesd", "bare": bare}
    command = [str(sources[arguments[0]]), str(tmp_path / arguments[1]), *arguments[2:]]
    assert main.run("convert", command) == 2
    assert pathlib.Path(tmp_path / arguments[1]).exists() is False
    import re

    assert re.search(f"^convert: {message}", capsys.readouterr().err)


def test_what_a_vae_of_the_hub_needs():
    names = ["README.md", "config.json", "diffusion_pytorch_model.bin"]
    weights = "diffusion_pytorch_model.safetensors"
    assert set(hub.needed([*names, weights], None, "vae")) == {"config.json", weights}
    whole = ["model_index.json", "unet/config.json", "vae/config.json", f"vae/{weights}"]
    assert set(hub.needed([*names, *whole], None, "vae")) == {"vae/config.json", f"vae/{weights}"}
    with pytest.raises(InputError, match="vae: got a repository without vae/ or config"):
        hub.needed(["vae.ckpt"], None, "vae")
