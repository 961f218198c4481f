"""Zip files as torch.save writes them, without PyTorch."""

import collections
import io
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np

STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
}


def torch_modules():
    """Modules by name for the writer below to name: pickle only writes names that it finds."""
    fake, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    fake._utils = utils
    for name in STORAGES:
        kind = type(name, (), {"__module__": "torch", "__qualname__": name})
        setattr(fake, name, kind)
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *a: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    return {"torch": fake, "torch._utils": utils}


class Storage:
    def __init__(self, key, kind, values):
        self.key, self.kind, self.values = key, kind, np.asarray(values, STORAGES[kind])


class Tensor:
    """Pickles as torch pickles a tensor."""

    def __init__(self, storage, offset, shape, strides):
        self.arguments = storage, offset, shape, strides, False, collections.OrderedDict()

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        return "storage", getattr(sys.modules["torch"], obj.kind), obj.key, "cpu", obj.values.size


def save(path, root, *storages, protocol=2, top="archive/"):
    data = io.BytesIO()
    Pickler(data, protocol).dump(root)
    write(path, data.getvalue(), *storages, top=top)
    return path


def write(path, program, *storages, top="archive/", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{top}data.pkl", program)
        for storage in storages:
            archive.writestr(f"{top}data/{storage.key}", storage.values.tobytes())
        archive.writestr(f"{top}version", "3\n")
    return path
