"""Presets against published models: configs, and the name and shape of every tensor."""

import dataclasses
import json
import pathlib

import pytest

from jaxdiff.checkpoints.configs import from_transformers
from jaxdiff.checkpoints.key_mapping import path_to_torch_key, torch_key_to_path, torch_shape
from jaxdiff.core.configs import from_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import flatten, parameter_count
from jaxdiff.models.build import abstract, param_dict
from jaxdiff.models.presets import PRESETS, preset

INVENTORIES = pathlib.Path(__file__).parent / "inventories"
CASES = [(kind, name) for kind, table in PRESETS.items() for name in table]


def inventory(kind, name):
    return json.loads((INVENTORIES / f"{kind}-{name}.json").read_text())


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_names_shapes_and_count(kind, name):
    published = inventory(kind, name)
    shapes = {key: tuple(shape) for key, shape in flatten(published["shapes"]).items()}
    if published["class"] == "CLIPTextModel":
        shapes = {f"text_model.{key}": shape for key, shape in shapes.items()}
    ours = param_dict(preset(kind, name).abstract())
    assert {path_to_torch_key(p): torch_shape(w.shape, p) for p, w in ours.items()} == shapes
    assert all(torch_key_to_path(path_to_torch_key(p), w.ndim) == p for p, w in ours.items())
    assert len(ours) == published["tensors"]
    assert parameter_count(ours) == published["parameters"] == preset(kind, name).parameters


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_config_is_the_published_one(kind, name):
    published, known = inventory(kind, name), preset(kind, name)
    if kind in ("text", "image"):
        config = from_transformers(type(known.config), published["config"], source=name)
        projects = known.options.get("with_projection", False)
        assert projects == published["class"].endswith("Projection")
    else:
        config = from_mapping(type(known.config), published["config"], source=name)
    assert config == known.config
    assert published["source"].startswith(known.source)


@pytest.mark.parametrize(("width", "parameters"), [(320, 935_365_830), (192, 371_605_830)])
def test_smaller_networks_of_the_pixel_cascade(width, parameters):
    """IF-I-L and IF-I-M, published as 0.9 and 0.4 billion, differ in widths only."""
    largest = preset("unet", "if-i-xl")
    widths = {"block_out_channels": tuple(width * i for i in (1, 2, 3, 4))}
    config = dataclasses.replace(largest.config, **widths, cross_attention_dim=4 * width)
    assert parameter_count(param_dict(abstract(largest.cls, config))) == parameters


def test_every_inventory_has_a_preset():
    assert {f"{kind}-{name}.json" for kind, name in CASES} == {
        path.name for path in INVENTORIES.glob("*.json")
    }


def test_unknown_names():
    with pytest.raises(InputError, match="did you mean 'sdxl-base'"):
        preset("unet", "sdxl-bse")
    with pytest.raises(InputError, match="kind of network"):
        preset("controlnet", "sd15")
