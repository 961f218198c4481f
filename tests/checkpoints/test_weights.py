"""Which weight files of a folder count, and indices of shards."""

import json

import numpy as np
import pytest
import safetensors.numpy

from jaxdiff.checkpoints.safetensors import read_tensor
from jaxdiff.checkpoints.weights import find_weights, read_weights, variants
from jaxdiff.core.errors import InputError

STEM = "diffusion_pytorch_model"
A = {"a": np.arange(3, dtype=np.float32)}
B = {"b": np.ones((2, 2), np.float16), "c": np.zeros(1, np.float16)}


def touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"")


def shards(folder, index="model.safetensors.index.json", **changes):
    """Two shards and their index; `changes` overrides places in it."""
    places = {}
    for i, tensors in enumerate((A, B), 1):
        name = f"model-0000{i}-of-00002.safetensors"
        safetensors.numpy.save_file(tensors, folder / name)
        places |= dict.fromkeys(tensors, name)
    places = {k: v for k, v in (places | changes).items() if v is not None}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": places}))
    return folder / index


@pytest.mark.parametrize(
    ("files", "variant", "expected"),
    [
        (["model.safetensors"], None, "model.safetensors"),
        ([f"{STEM}.safetensors"], None, f"{STEM}.safetensors"),
        (["model.fp16.safetensors", "model.safetensors"], None, "model.safetensors"),
        (["model.fp16.safetensors", "model.safetensors"], "fp16", "model.fp16.safetensors"),
        (["model.fp16.safetensors"], None, "model.fp16.safetensors"),
        (
            [f"{STEM}.fp16.safetensors", f"{STEM}.non_ema.safetensors"],
            None,
            f"{STEM}.fp16.safetensors",
        ),
        ([f"{STEM}.non_ema.safetensors"], None, f"{STEM}.non_ema.safetensors"),
        (["pytorch_model.bin", "model.fp16.safetensors"], None, "model.fp16.safetensors"),
        (["pytorch_model.bin", "flax_model.msgpack"], None, "pytorch_model.bin"),
        (["diffusion_pytorch_model.fp16.bin"], "fp16", "diffusion_pytorch_model.fp16.bin"),
        (["diffusion_flax_model.msgpack"], None, "diffusion_flax_model.msgpack"),
        (
            ["model.safetensors.index.json", "model-00001-of-00001.safetensors"],
            None,
            "model.safetensors.index.json",
        ),
        (
            ["model.safetensors.index.json", "model.safetensors"],
            None,
            "model.safetensors",
        ),
        (
            ["model.safetensors.index.fp16.json", "model.safetensors.index.json"],
            "fp16",
            "model.safetensors.index.fp16.json",
        ),
        (
            ["model.fp16.safetensors.index.json", "model.fp16-00001-of-00001.safetensors"],
            None,
            "model.fp16.safetensors.index.json",
        ),
        (
            ["model_old.safetensors", "openvino_model.bin", "model.fp16.safetensors"],
            None,
            "model.fp16.safetensors",
        ),
    ],
)
def test_the_file_that_counts(tmp_path, files, variant, expected):
    touch(tmp_path, *files)
    assert find_weights(tmp_path, variant=variant) == tmp_path / expected


@pytest.mark.parametrize(
    ("files", "variant", "message"),
    [
        ([], None, "an empty folder, expected diffusion_pytorch_model.safetensors"),
        (["config.json"], None, "got config.json, expected"),
        (["config.json", "weights.ckpt"], None, "got weights.ckpt, expected"),
        (["model.msgpack"], None, "got model.msgpack"),
        (["model.safetensors"], "fp16", "expected variant 'fp16'"),
        (["model.x.safetensors", "model.y.safetensors"], None, "variants x, y"),
        (["model-00001-of-00002.safetensors"], None, "got model-00001"),
    ],
)
def test_no_weights_or_too_many(tmp_path, files, variant, message):
    touch(tmp_path, *files)
    with pytest.raises(InputError, match=message) as error:
        find_weights(tmp_path, variant=variant)
    assert str(tmp_path) in str(error.value)


def test_no_folder(tmp_path):
    assert variants(tmp_path / "gone") == {}
    with pytest.raises(InputError, match="gone: got no such folder"):
        find_weights(tmp_path / "gone")


def test_shards_are_one_table(tmp_path):
    table = read_weights(shards(tmp_path))
    got = {name: read_tensor(entry) for name, entry in table.items()}
    assert got.keys() == {"a", "b", "c"}
    for name, array in (A | B).items():
        np.testing.assert_array_equal(got[name], array)


BAD_INDICES = {
    "missing shard": ({"d": "model-00003-of-00003.safetensors"}, "00003.safetensors: got no such"),
    "outside": ({"d": "../other.safetensors"}, "got the shard '../other.safetensors' for d"),
    "absolute": ({"d": "/etc/x.safetensors"}, "got the shard"),
    "backslash": ({"d": "..\\x.safetensors"}, "got the shard"),
    "other file": ({"d": "config.json"}, "expected the name of a .safetensors file"),
    "number": ({"d": 3}, "got the shard 3"),
    "not in the shard": ({"d": "model-00002-of-00002.safetensors"}, "got other tensors .*: d"),
    "not in the index": ({"c": None}, "got other tensors .*: c"),
    "wrong shard": ({"c": "model-00001-of-00002.safetensors"}, "got other tensors"),
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_bad_index(tmp_path, case):
    changes, message = BAD_INDICES[case]
    with pytest.raises(InputError, match=message) as error:
        read_weights(shards(tmp_path, **changes))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_without_places(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        read_weights(path)


def test_links_to_shards_are_followed(tmp_path):
    """The hub's cache keeps files as links into a folder of blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    index = shards(tmp_path / "blobs")
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert read_weights(tmp_path / "snapshot" / index.name).keys() == {"a", "b", "c"}
