"""The safetensors reader and writer against the reference implementation and broken files."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdiff.checkpoints.safetensors import (
    ALIGNMENT,
    MAX_HEADER,
    LazyTensor,
    read_table,
    read_tensor,
    write_tensors,
)
from jaxdiff.core.errors import InputError

RNG = np.random.default_rng(0)
SAMPLE = {
    "w": RNG.normal(size=(4, 3)).astype(np.float32),
    "half": RNG.normal(size=(5,)).astype(np.float16),
    "brain": RNG.normal(size=(2, 3, 1, 1)).astype(ml_dtypes.bfloat16),
    "count": np.arange(3, dtype=np.int64),
    "scalar": np.array(2.5, np.float32),
    "none": np.zeros((0, 7), np.float32),
    "flag": np.array([True, False]),
}


def pending(array):
    return LazyTensor(dtype=array.dtype, shape=array.shape, fetch=lambda: array)


def read_all(path):
    return {name: read_tensor(entry) for name, entry in read_table(path).items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes()


def with_header(table, data=b""):
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(header).to_bytes(8, "little") + header + data


def row(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_reference_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(SAMPLE, path, metadata={"a": "b"})
    assert_same(read_all(path), SAMPLE)


def test_reference_reads_what_we_write(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {name: pending(array) for name, array in SAMPLE.items()})
    assert_same(safetensors.numpy.load_file(path), SAMPLE)
    assert_same(read_all(path), SAMPLE)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_writes_the_bytes_that_the_reference_writes(tmp_path):
    ours, theirs = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    arrays = {name: SAMPLE[name] for name in ("w", "half", "count")}
    write_tensors(ours, {name: pending(array) for name, array in arrays.items()})
    safetensors.numpy.save_file(arrays, theirs, metadata={"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()


def test_strided_arrays_are_written_in_order(tmp_path):
    path = tmp_path / "x.safetensors"
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    write_tensors(path, {"x": pending(array)})
    np.testing.assert_array_equal(read_all(path)["x"], array)


def test_buffers_are_aligned_and_apart(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(SAMPLE, path)
    first, second = read_all(path), read_all(path)
    assert all(array.ctypes.data % ALIGNMENT == 0 for array in first.values() if array.size)
    first["w"][:] = 0
    assert second["w"].any()


BROKEN = {
    "empty": (b"", "0 bytes"),
    "short": (b"\x01\x02", "truncated"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
    "page": (b"<!DOCTYPE html><html><head></head></html>", "HTML page"),
    "indented page": (b"\n  <html><body>Not found</body></html>", "HTML page"),
    "zip": (b"PK\x03\x04" + bytes(60), "pickled"),
    "pickle": (b"\x80\x02}q\x00." + bytes(60), "pickled"),
    "absurd header": ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", "at most 100000000"),
    "header cut": ((1000).to_bytes(8, "little") + b'{"a": ', "truncated"),
    "no JSON": (with_header(b"hello"), "invalid JSON"),
    "no text": (with_header(b"\xff\xfe{}"), "invalid JSON"),
    "deep JSON": (with_header(b"[" * 100_000), "invalid JSON"),
    "no object": (with_header([]), "JSON list"),
    "metadata": (with_header({"__metadata__": {"a": 1}}), "__metadata__"),
    "no row": (with_header({"a": 3}), "in the header"),
    "missing field": (with_header({"a": {"dtype": "F32", "shape": []}}), "in the header"),
    "unknown dtype": (with_header({"a": row("Q7")}, bytes(8)), "known dtype"),
    "unhashable dtype": (with_header({"a": row(["F32"])}, bytes(8)), "known dtype"),
    "negative shape": (with_header({"a": row(shape=(-2,))}, bytes(8)), "in the header"),
    "boolean shape": (with_header({"a": row(shape=(2, True))}, bytes(8)), "in the header"),
    "fraction": (with_header({"a": row(shape=(2.0,))}, bytes(8)), "in the header"),
    "reversed": (with_header({"a": row(offsets=(8, 0))}), "expected 8"),
    "wrong size": (with_header({"a": row(shape=(3,))}, bytes(8)), "expected 12"),
    "gap": (with_header({"a": row(offsets=(4, 12))}, bytes(12)), "gap"),
    "overlap": (with_header({"a": row(), "b": row()}, bytes(8)), "overlap"),
    "twice": (with_header(b'{"a": %b, "a": %b}' % ((json.dumps(row()).encode(),) * 2)), "twice"),
    "data cut": (with_header({"a": row()}, bytes(7)), "truncated"),
    "data left": (with_header({"a": row()}, bytes(9)), "follows"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_named(tmp_path, case):
    data, message = BROKEN[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        read_table(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.safetensors: got no such file"):
        read_table(tmp_path / "gone.safetensors")
    with pytest.raises(InputError, match="directory"):
        read_table(tmp_path)


def test_exponents_in_eight_bits_are_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header({"a": row("F8_E8M0", (8,))}, bytes(8)))
    with pytest.raises(InputError, match="a in F8_E8M0, expected F32, F16, BF16 or F8_E4M3"):
        read_tensor(read_table(path)["a"])


def test_file_cut_after_the_table_was_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": SAMPLE["w"]}, path)
    entry = read_table(path)["a"]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="cut short"):
        read_tensor(entry)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


WHOLE = safetensors.numpy.save(SAMPLE, metadata={"format": "pt"})
HEADER = 8 + int.from_bytes(WHOLE[:8], "little")


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, len(WHOLE) - 1))
def test_any_truncation_is_an_input_error(folder, cut):
    path = folder / "cut.safetensors"
    path.write_bytes(WHOLE[:cut])
    with pytest.raises(InputError, match=r"cut\.safetensors"):
        read_table(path)


@settings(max_examples=400, deadline=None)
@given(bits=st.lists(st.integers(0, 8 * HEADER - 1), min_size=1, max_size=3, unique=True))
def test_flipped_header_bits_never_crash(folder, bits):
    """Either one error that names the file, or a table whose tensors can all be read."""
    data = bytearray(WHOLE)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    path = folder / "flipped.safetensors"
    path.write_bytes(data)
    try:
        for entry in read_table(path).values():
            assert read_tensor(entry).shape == entry.shape
    except InputError as error:
        assert "flipped.safetensors" in str(error)  # noqa: PT017
