"""PyTorch's zip files without PyTorch: what is read, and that nothing in them is ever run."""

import collections
import io
import os
import sys
import types
import zipfile

import numpy as np
import pytest
from pickles import STORAGES, Call, Pickler, Storage, Tensor, save, torch_modules, write

from jaxdiff.checkpoints.safetensors import read_tensor
from jaxdiff.checkpoints.torch_pickle import read_torch_pickle
from jaxdiff.core.errors import InputError


@pytest.fixture(autouse=True)
def torch(monkeypatch):
    """The modules that pickles name."""
    modules = torch_modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["torch"]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("top", ["archive/", ""])
def test_tensors_of_every_kind(tmp_path, protocol, top):
    storages = [Storage(str(i), kind, range(i, i + 6)) for i, kind in enumerate(STORAGES)]
    root = {f"layer.{s.kind}": Tensor(s, 0, (2, 3), (3, 1)) for s in storages}
    path = save(tmp_path / "x.ckpt", root, *storages, protocol=protocol, top=top)
    table = read_torch_pickle(path)
    assert table.keys() == root.keys()
    for storage in storages:
        got = read_tensor(table[f"layer.{storage.kind}"])
        assert got.dtype == STORAGES[storage.kind]
        np.testing.assert_array_equal(got, storage.values.reshape(2, 3))


def test_views_share_a_storage(tmp_path):
    storage = Storage("0", "FloatStorage", range(24))
    values = storage.values
    root = {
        "slice": Tensor(storage, 4, (2, 3), (3, 1)),
        "transpose": Tensor(storage, 0, (4, 6), (1, 4)),
        "channels last": Tensor(storage, 0, (2, 3, 2, 2), (12, 1, 6, 3)),
        "scalar": Tensor(storage, 5, (), ()),
        "row": Tensor(storage, 0, (1, 4), (99, 1)),
        "nothing": Tensor(storage, 0, (0, 4), (4, 1)),
    }
    table = read_torch_pickle(save(tmp_path / "x.pt", root, storage))
    expected = {
        "slice": values[4:10].reshape(2, 3),
        "transpose": values.reshape(6, 4).T,
        "channels last": values.reshape(2, 2, 2, 3).transpose(0, 3, 1, 2),
        "scalar": values[5],
        "row": values[:4].reshape(1, 4),
        "nothing": np.zeros((0, 4), np.float32),
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(read_tensor(table[name]), value)


def test_a_training_checkpoint_gives_its_state_dict(tmp_path):
    storage = Storage("0", "FloatStorage", range(4))
    state = collections.OrderedDict(a=Tensor(storage, 0, (4,), (1,)))
    state._metadata = {"": {"version": 1}}
    # Lightning's callbacks are keyed by their class: a name that is mentioned, but not called.
    root = {"epoch": 3, "lr": 1e-4, "callbacks": {zipfile.ZipFile: {"best": None}}}
    table = read_torch_pickle(save(tmp_path / "x.ckpt", root | {"state_dict": state}, storage))
    assert table.keys() == {"a"}


def test_parameters_and_nested_dictionaries(tmp_path, torch):
    storage = Storage("0", "HalfStorage", range(2))
    tensor = Tensor(storage, 0, (2,), (1,))
    root = {"*": Call(torch._utils._rebuild_parameter, tensor, True, {}), "more": {"b": tensor}}
    assert read_torch_pickle(save(tmp_path / "x.pt", root, storage)).keys() == {"*", "more.b"}


@pytest.mark.parametrize(
    "call",
    [
        lambda mark: Call(os.system, f"touch {mark}"),
        lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Call(open, str(mark), "w"),
        lambda mark: Call(__import__, "os"),
        lambda mark: types.SimpleNamespace(a=1),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_file_is_refused_and_not_run(tmp_path, call, protocol):
    mark = tmp_path / "mark"
    path = save(tmp_path / "x.ckpt", {"state_dict": {"a": call(mark)}}, protocol=protocol)
    with pytest.raises(InputError, match=r"x\.ckpt: got .*expected only tensors"):
        read_torch_pickle(path)
    assert not mark.exists()


def test_importing_is_not_even_tried(tmp_path):
    program = b"\x80\x02cno_such_module\nno_such_name\n."
    assert read_torch_pickle(write(tmp_path / "x.pt", program)) == {}


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # room for 2**31 memos
        b"\x80\x02\x82\x01.",  # a registered extension
        b"(ios\nsystem\n.",
        b"\x80\x02X\xff\xff\xff\xffabc.",
        b"\x80\x02}q\x00",
        b"",
        b"\x80\x63.",
        b"garbage",
    ],
)
def test_broken_programs_are_refused(tmp_path, program):
    with pytest.raises(InputError, match=r"x\.pt: got .*expected (only )?tensors"):
        read_torch_pickle(write(tmp_path / "x.pt", program))


def test_endless_dictionaries_are_refused(tmp_path):
    endless = {}
    endless["a"] = endless
    with pytest.raises(InputError, match="inside each other"):
        read_torch_pickle(save(tmp_path / "x.pt", endless))


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (7,), (1,)), (1, (6,), (1,)), (0, (2, 2), (4, 2)), (0, (3,), (0,))],
)
def test_views_beyond_or_with_holes_are_refused(tmp_path, offset, shape, strides):
    storage = Storage("0", "FloatStorage", range(6))
    path = save(tmp_path / "x.pt", {"a": Tensor(storage, offset, shape, strides)}, storage)
    with pytest.raises(InputError, match=r"got a .* outside its storage"):
        read_torch_pickle(path)


def test_missing_and_compressed_storages_are_refused(tmp_path):
    storage = Storage("0", "FloatStorage", range(6))
    tensor = {"a": Tensor(storage, 0, (6,), (1,))}
    with pytest.raises(InputError, match="outside its storage"):
        read_torch_pickle(save(tmp_path / "x.pt", tensor))
    data = io.BytesIO()
    Pickler(data, 2).dump(tensor)
    squeezed = write(tmp_path / "y.pt", data.getvalue(), storage, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="expected a few MB, uncompressed"):
        read_torch_pickle(squeezed)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x80\x02}.", b"x" * 100])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.ckpt: got .*torch\.save"):
        read_torch_pickle(path)
    with pytest.raises(InputError, match="no such file"):
        read_torch_pickle(tmp_path / "none.ckpt")


def test_zip_files_of_something_else_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match=r"got 0 members data\.pkl"):
        read_torch_pickle(tmp_path / "x.pt")
