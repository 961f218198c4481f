"""The original layout: every name of the published models, and the configs that shapes tell."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from jaxdiff.checkpoints import infer_config, ldm_reader, ldm_writer
from jaxdiff.checkpoints.safetensors import (
    LazyTensor,
    TensorInfo,
    read_table,
    read_tensor,
    write_tensors,
)
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import flatten
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.models.presets import preset
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.vae import AutoencoderKLConfig

TABLES = pathlib.Path(__file__).parent / "original"
SHAPES = pathlib.Path(__file__).parents[1] / "models" / "inventories"
UNETS = {
    "sd15": ("unet_sd15", {"attention_head_dim": 8, "sample_size": 64}),
    "sd21": ("unet_sd15", {"sample_size": 96}),  # the names are the same
    "sdxl-base": ("unet_sdxl_base", {"sample_size": 128}),
    "sdxl-refiner": ("unet_sdxl_refiner", {"sample_size": 128}),
}
TEXTS = {
    "clip-l": {"hidden_act": "quick_gelu"},
    "openclip-h": {"hidden_act": "gelu", "projection_dim": 512},
    "openclip-bigg": {"hidden_act": "gelu"},
}


def inventory(name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a published model by name."""
    published = json.loads((SHAPES / f"{name}.json").read_text())
    prefix = "text_model." if published["class"] == "CLIPTextModel" else ""
    return {prefix + key: tuple(shape) for key, shape in flatten(published["shapes"]).items()}


def entry(name: str, shape: tuple[int, ...], start: int = 0) -> TensorInfo:
    """A tensor of the table of a float16 file that is never opened."""
    nbytes = 2 * int(np.prod(shape))
    return TensorInfo(
        path=pathlib.Path("x.safetensors"),
        name=name,
        dtype="F16",
        shape=shape,
        start=start,
        nbytes=nbytes,
    )


def table(name: str) -> dict:
    return json.loads((TABLES / f"{name}.json").read_text())["map"]


def entries(shapes_: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: entry(name, shape) for name, shape in shapes_.items()}


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
    names, options = UNETS[name]
    expected = inventory(f"unet-{name}")
    mapped = {k: v.removeprefix("model.diffusion_model.") for k, v in table(names).items()}
    assert mapped.keys() == expected.keys()
    got = ldm_reader.unet_from_ldm(entries({mapped[k]: shape for k, shape in expected.items()}))
    assert {k: e.shape for k, e in got.items()} == expected
    assert {k: e.name for k, e in got.items()} == mapped
    assert ldm_writer.unet_to_ldm_keys(expected) == mapped
    config = UNet2DConditionConfig(**infer_config.unet_fields(got) | options)
    wanted = preset("unet", name).config
    assert config == dataclasses.replace(wanted, upcast_attention=config.upcast_attention)


@pytest.mark.parametrize(("name", "factor"), [("sd", 0.18215), ("sdxl", 0.13025)])
def test_vae(name, factor):
    expected = inventory(f"vae-{name}")
    mapped = {k: v.removeprefix("first_stage_model.") for k, v in table("vae_sd").items()}
    assert mapped.keys() == expected.keys()
    ones = {
        k: (*s, 1, 1) if ".attentions.0.to_" in k and len(s) == 2 else s
        for k, s in expected.items()
    }
    got = ldm_reader.vae_from_ldm(entries({mapped[k]: shape for k, shape in ones.items()}))
    assert {k: e.shape for k, e in got.items()} == expected
    assert {k: e.name for k, e in got.items()} == mapped
    wanted = preset("vae", name).config
    scaling = {"scaling_factor": factor, "sample_size": wanted.sample_size}
    assert AutoencoderKLConfig(**infer_config.vae_fields(got) | scaling) == wanted


@pytest.mark.parametrize(
    ("name", "names", "prefix"),
    [
        ("openclip-h", "openclip_h_sd21", "cond_stage_model.model."),
        ("openclip-bigg", "openclip_bigg_sdxl", "conditioner.embedders.1.model."),
    ],
)
def test_open_clip(name, names, prefix):
    expected = inventory(f"text-{name}")
    drop = name == "openclip-h"
    stored: dict[str, tuple[int, ...]] = {}
    for key, (place, how) in table(names).items():
        shape = expected[key]
        if how.startswith("rows"):
            shape = (3 * shape[0], *shape[1:])
        stored[place.removeprefix(prefix)] = shape[::-1] if how == "transpose" else shape
    if drop:  # the file holds the 24th layer and the projection all the same
        last = {k.replace(".22.", ".23."): s for k, s in stored.items() if ".22." in k}
        stored |= last | {"text_projection": (1024, 1024)}
    got = ldm_reader.clip_from_open_clip(entries(stored), depth=23 if drop else None)
    assert {k: e.shape for k, e in got.items()} == expected
    for key, (place, how) in table(names).items():
        found = got[key]
        assert found.name == place.removeprefix(prefix)
        assert found.axes == ((1, 0) if how == "transpose" else None)
        if how.startswith("rows"):
            first = int(how.removeprefix("rows ").split(":")[0])
            row = 2 * int(np.prod(expected[key][1:]))
            assert found.start == first * row
            assert found.nbytes == 2 * int(np.prod(expected[key]))
    fields = infer_config.clip_text_fields(got) | TEXTS[name]
    assert CLIPTextConfig(**fields) == preset("text", name).config


def test_text_config_of_clip_l():
    fields = infer_config.clip_text_fields(entries(inventory("text-clip-l"))) | TEXTS["clip-l"]
    assert CLIPTextConfig(**fields) == preset("text", "clip-l").config


def test_rows_and_transposes_of_a_file(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    path = tmp_path / "x.safetensors"
    pending = LazyTensor(dtype=values.dtype, shape=values.shape, fetch=lambda: values)
    write_tensors(path, {"before": pending, "x": pending})
    stored = read_table(path)["x"]
    np.testing.assert_array_equal(read_tensor(stored.rows(2, 4)), values[2:4])
    np.testing.assert_array_equal(read_tensor(stored.transposed()), values.T)
    np.testing.assert_array_equal(read_tensor(stored.rows(1, 5).transposed()), values[1:5].T)


def test_other_axis_orders(tmp_path):
    values = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    path = tmp_path / "x.safetensors"
    write_tensors(
        path, {"x": LazyTensor(dtype=values.dtype, shape=values.shape, fetch=lambda: values)}
    )
    stored = read_table(path)["x"]
    for axes in ((3, 2, 0, 1), (2, 3, 1, 0), (1, 0, 2, 3)):
        turned = values.transpose(axes)
        got = read_tensor(dataclasses.replace(stored, shape=turned.shape, axes=axes))
        np.testing.assert_array_equal(got, turned)


def test_three_parts_must_be_equal():
    broken = {"transformer.resblocks.0.attn.in_proj_bias": entry("b", (7,))}
    with pytest.raises(InputError, match=r"b \(7,\), expected 3 equal parts"):
        ldm_reader.clip_from_open_clip(broken)


def test_two_names_of_one_tensor_are_refused():
    with pytest.raises(InputError, match="expected one"):
        ldm_reader.unet_from_ldm({n: entry(n, (1,)) for n in ("out.0.bias", "conv_norm_out.bias")})
