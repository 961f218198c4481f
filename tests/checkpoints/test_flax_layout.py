"""Legacy Flax folders as they are written: names, shapes, bytes, and the way back."""

import dataclasses
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization, traverse_util

from jaxdiff.checkpoints.components import Component
from jaxdiff.checkpoints.flax_layout import flax_names, write_flax
from jaxdiff.checkpoints.key_aliases import canonical
from jaxdiff.checkpoints.model_registry import MODEL_CLASSES
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import flatten
from jaxdiff.models.build import abstract, initialise, param_dict, with_params
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.presets import preset
from jaxdiff.models.unet.module import UNet2DConditionModel

HERE = pathlib.Path(__file__).parent
SHAPES = HERE.parent / "models" / "inventories"
# Table of names -> the network, and its class.
MODELS = {
    "unet_sdxl_base": ("unet", "sdxl-base", "UNet2DConditionModel"),
    "vae_sd": ("vae", "sd", "AutoencoderKL"),
    "clip_l_sd15": ("text", "clip-l", "CLIPTextModel"),
    "openclip_bigg_sdxl": ("text", "openclip-bigg", "CLIPTextModelWithProjection"),
}
TRANSFORMS = {
    "same": lambda shape: shape,
    "transpose": lambda shape: shape[::-1],
    "OIHW->HWIO: transpose(2,3,1,0)": lambda shape: tuple(shape[i] for i in (2, 3, 1, 0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_of_published_models(name):
    kind, size, class_name = MODELS[name]
    published = flatten(json.loads((SHAPES / f"{kind}-{size}.json").read_text())["shapes"])
    torch = {canonical(key, class_name=class_name): tuple(s) for key, s in published.items()}
    table = json.loads((HERE / "flax" / f"{name}.json").read_text())["map"]
    expected = {
        place: TRANSFORMS[how](torch[canonical(key, class_name=class_name)])
        for key, (place, how) in table.items()
    }
    ours = param_dict(preset(kind, size).abstract())
    assert {"/".join(flax_names(p, class_name)): w.shape for p, w in ours.items()} == expected


FEW_GROUPS = (
    "ignore:UNet2DConditionModel. norm_num_groups is 4, and the class of Flax knows 32 only"
)


@pytest.fixture(scope="module")
def parts(parts):
    """The parts of a pipeline that Flax's classes can hold: 32 groups in the UNet's norms."""
    config = dataclasses.replace(
        parts.components["unet"].module.config, block_out_channels=(32, 64), norm_num_groups=32
    )
    unet = Component(module=initialise(UNet2DConditionModel, config, seed=0))
    return dataclasses.replace(parts, components={**parts.components, "unet": unet})


@pytest.mark.filterwarnings(FEW_GROUPS)
@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_bytes_are_those_that_flax_writes(name, components, tmp_path):
    module = components[name].module
    write_flax(tmp_path / "x.msgpack", module, class_name=name)
    tree = traverse_util.unflatten_dict(
        {flax_names(path, name): np.asarray(array) for path, array in param_dict(module).items()}
    )
    assert (tmp_path / "x.msgpack").read_bytes() == serialization.to_bytes(tree)


def test_long_maps_are_those_that_flax_writes(components, tmp_path):
    """Fifteen names fit the short form of a map; eighteen layers do not."""
    config = dataclasses.replace(components["CLIPTextModel"].module.config, num_hidden_layers=18)
    module = abstract(CLIPTextModel, config)
    values = {path: jnp.ones(leaf.shape, leaf.dtype) for path, leaf in param_dict(module).items()}
    write_flax(tmp_path / "x", with_params(module, values), class_name="CLIPTextModel")
    tree = traverse_util.unflatten_dict({tuple(p.split(".")): v for p, v in values.items()})
    assert (tmp_path / "x").read_bytes() == serialization.to_bytes(tree)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16])
def test_a_folder_comes_back_bit_for_bit(parts, tmp_path, dtype):
    write_pipeline(tmp_path / "flax", parts, dtype=dtype, flax=True)
    back = read_pipeline(tmp_path / "flax")
    assert back.class_name == parts.class_name
    assert back.scheduler == parts.scheduler
    assert back.defaults == parts.defaults
    assert set(back.absent) == {"feature_extractor", "safety_checker"}
    assert back.tokenizers["tokenizer"].files == parts.tokenizers["tokenizer"].files
    for name, component in parts.components.items():
        got = param_dict(back.components[name].module)
        for path, values in param_dict(component.module).items():
            want = np.asarray(values if dtype is None else values.astype(dtype))
            assert got[path].dtype == want.dtype
            assert np.asarray(got[path]).tobytes() == want.tobytes(), path
    again = tmp_path / "again"
    write_pipeline(again, back, dtype=dtype, flax=True)
    for file in (tmp_path / "flax").rglob("*.msgpack"):
        assert (again / file.relative_to(tmp_path / "flax")).read_bytes() == file.read_bytes()


def test_the_folder_is_that_of_the_former_flax_classes(parts, tmp_path):
    write_pipeline(tmp_path, parts, flax=True)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("_diffusers_version") == "0.39.0"
    assert index == {
        "_class_name": "FlaxStableDiffusionPipeline",
        # With null for the library too, the former loader wants them as arguments.
        "feature_extractor": ["transformers", None],
        "safety_checker": ["stable_diffusion", None],
        "scheduler": ["diffusers", "FlaxDDIMScheduler"],
        "text_encoder": ["transformers", "FlaxCLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "FlaxUNet2DConditionModel"],
        "vae": ["diffusers", "FlaxAutoencoderKL"],
    }
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert {name for name in files if name.endswith((".msgpack", ".safetensors"))} == {
        "text_encoder/flax_model.msgpack",
        "unet/diffusion_flax_model.msgpack",
        "vae/diffusion_flax_model.msgpack",
    }
    classes = {"unet": "FlaxUNet2DConditionModel", "vae": "FlaxAutoencoderKL"}
    for name, cls in classes.items():
        assert json.loads((tmp_path / name / "config.json").read_text())["_class_name"] == cls
    text = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert text["architectures"] == ["CLIPTextModel"]
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "FlaxDDIMScheduler"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_name": "StableDiffusionXLImg2ImgPipeline"}, "class for Flax: got 'StableDiffusi"),
        (
            {"scheduler": {"_class_name": "UniPCMultistepScheduler"}},
            "scheduler for Flax: got 'Uni",
        ),
    ],
)
def test_what_flax_never_had_is_refused(parts, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        write_pipeline(tmp_path / "x", dataclasses.replace(parts, **changes), flax=True)
    assert list(tmp_path.iterdir()) == []


def test_what_the_classes_of_flax_have_not_is_a_warning(components, tmp_path):
    module = components["UNet2DConditionModel"].module
    with pytest.warns(UserWarning, match="norm_num_groups is 4, and the class of Flax knows 32"):
        write_flax(tmp_path / "x.msgpack", module, class_name="UNet2DConditionModel")


def test_convert(parts, tmp_path, capsys):
    folder = tmp_path / "torch"
    write_pipeline(folder, parts)
    arguments = [str(folder), str(tmp_path / "flax"), "--format", "flax", "--dtype", "bfloat16"]
    assert main.run("convert", arguments) == 0
    assert main.run("convert", [str(tmp_path / "flax"), str(tmp_path / "back")]) == 0
    assert "flax: StableDiffusionPipeline, " in capsys.readouterr().out
    assert (tmp_path / "back" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    back = read_pipeline(tmp_path / "back")
    for name, component in parts.components.items():
        got = param_dict(back.components[name].module)
        for path, values in param_dict(component.module).items():
            np.testing.assert_array_equal(got[path], values.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("output", "arguments", "message"),
    [
        ("x", ["--format", "flx"], "format: got 'flx', .*'flax'"),
        ("x.safetensors", ["--format", "flax"], "x.safetensors, expected a folder for"),
        ("x", ["--format", "original"], "x, expected FILE.safetensors for"),
        ("x.msgpack", ["--format", "flax"], "x.msgpack, expected a folder or FILE.safe"),
    ],
)
def test_a_format_that_does_not_fit(folder, capsys, output, arguments, message):
    output = folder.parent / output
    assert main.run("convert", [str(folder), str(output), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not output.exists()
