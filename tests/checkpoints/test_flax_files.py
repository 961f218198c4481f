"""Legacy Flax files: every name of the published models, values, and broken files."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from jaxdiff.checkpoints.flax_msgpack import read_flax_msgpack, torch_name
from jaxdiff.checkpoints.key_aliases import canonical
from jaxdiff.checkpoints.safetensors import read_tensor
from jaxdiff.core.errors import InputError

MAPS = pathlib.Path(__file__).parent / "flax"
CLASSES = {
    "unet_sdxl_base": "UNet2DConditionModel",
    "vae_sd": "AutoencoderKL",
    "clip_l_sd15": "CLIPTextModel",
}


def write(path, tree):
    path.write_bytes(serialization.to_bytes(tree))
    return path


def array(*shape, dtype=np.float32):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("name", CLASSES)
def test_names_of_published_models(name):
    table = json.loads((MAPS / f"{name}.json").read_text())["map"]
    for key, (place, _) in table.items():
        got = canonical(torch_name(tuple(place.split("/"))), class_name=CLASSES[name])
        assert got == canonical(key, class_name=CLASSES[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_come_in_the_layout_of_pytorch(tmp_path, dtype):
    tree = {
        "conv_in": {"kernel": array(3, 2, 4, 5, dtype=dtype), "bias": array(5, dtype=dtype)},
        "down_blocks_0": {"resnets_1": {"norm1": {"scale": array(4, dtype=dtype)}}},
        "time_embedding": {"linear_1": {"kernel": array(2, 3, dtype=dtype)}},
        "token_embedding": {"embedding": array(7, 2, dtype=dtype)},
    }
    table = read_flax_msgpack(write(tmp_path / "x.msgpack", tree))
    expected = {
        "conv_in.weight": tree["conv_in"]["kernel"].transpose(3, 2, 0, 1),
        "conv_in.bias": tree["conv_in"]["bias"],
        "down_blocks.0.resnets.1.norm1.weight": array(4, dtype=dtype),
        "time_embedding.linear_1.weight": array(2, 3, dtype=dtype).T,
        "token_embedding.weight": array(7, 2, dtype=dtype),
    }
    assert table.keys() == expected.keys()
    for name, values in expected.items():
        assert table[name].shape == values.shape
        got = read_tensor(table[name])
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, values)


def test_long_maps_names_and_arrays(tmp_path):
    tree = {f"layer_with_a_rather_long_name_number_{i}": {"bias": array(300)} for i in range(70)}
    table = read_flax_msgpack(write(tmp_path / "x.msgpack", tree))
    assert len(table) == 70
    for entry in table.values():
        np.testing.assert_array_equal(read_tensor(entry), array(300))


def test_files_cut_short_anywhere_are_refused(tmp_path):
    whole = write(tmp_path / "x.msgpack", {"a": {"kernel": array(3, 4), "bias": array(4)}})
    data = whole.read_bytes()
    assert read_flax_msgpack(whole)
    for length in range(len(data)):
        whole.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"x\.msgpack: got"):
            read_flax_msgpack(whole)


@pytest.mark.parametrize(
    "data",
    [
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<!doctype html>",
        b"\x93\x01\x02\x03",
        b"\x81\xa1a\x05",
        b"\x81\xa1a\xc1",
        b"\x81\xa1a\xd4\x02\x00",
        b"\x81\xa2\xff\xfe\x80",
        b"\x81\xdb\x7f\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x80 ",
        b"\x81\xa1a" * 40 + b"\x80",
    ],
)
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "x.msgpack"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.msgpack: got"):
        read_flax_msgpack(path)


@pytest.mark.parametrize(
    "content",
    [
        [[2], "float32", bytes(4)],
        [[2], "complex64", bytes(16)],
        [[2], "float32", bytes(8), 1],
        [2, "float32", bytes(8)],
        [[1] * 40, "float32", bytes(4)],
    ],
)
def test_arrays_that_contradict_themselves_are_refused(tmp_path, content):
    import msgpack

    extension = msgpack.ExtType(1, msgpack.packb(content))
    path = tmp_path / "x.msgpack"
    path.write_bytes(msgpack.packb({"a": extension}))
    with pytest.raises(InputError, match=r"x\.msgpack: got"):
        read_flax_msgpack(path)
    with pytest.raises(InputError, match="no such file"):
        read_flax_msgpack(tmp_path / "y.msgpack")
