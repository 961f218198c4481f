"""What is missing where nothing can be compiled, and what compilers are told."""

import os
from contextlib import nullcontext
from importlib import metadata

import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.parallel.chips import CHIPS
from jaxdiff.planning import compilers
from jaxdiff.planning.compilers import compiler_version, configure_compiler

GIVEN = (
    "ALLOW_MULTIPLE_LIBTPU_LOAD",
    "TPU_SKIP_MDS_QUERY",
    "TPU_WORKER_HOSTNAMES",
    "TPU_ACCELERATOR_TYPE",
)


@pytest.mark.parametrize(
    ("chip", "missing", "install"),
    [
        ("v5e", {"libtpu"}, "tpu"),
        ("v5e", {"flatbuffers"}, "tpu"),
        ("h200", {"jax_cuda13_plugin", "jax_cuda12_plugin"}, "cuda13"),
        ("h200", {"nvidia.cudnn"}, "cuda13"),
    ],
)
def test_packages_that_are_missing_are_named(monkeypatch, chip, missing, install):
    monkeypatch.setattr(compilers, "installed", lambda name: name not in missing)
    said = rf'no package ({"|".join(missing)}), expected all of pip install "jax\[{install}\]"'
    with pytest.raises(InputError, match=said):
        configure_compiler(CHIPS[chip], bundle_folder="nowhere")


def test_either_plugin_compiles_for_gpus(monkeypatch):
    monkeypatch.setattr(compilers, "installed", lambda name: name != "jax_cuda13_plugin")
    monkeypatch.setattr(metadata, "version", {"jax-cuda12-plugin": "0.10.2"}.__getitem__)
    configure_compiler(CHIPS["h200"])
    assert compiler_version(CHIPS["h200"]) == "jax-cuda12-plugin 0.10.2"


@pytest.mark.parametrize(("installed", "refused"), [("0.0.42.1", False), ("0.0.52", True)])
def test_the_compiler_is_the_one_that_jax_asks_for(monkeypatch, installed, refused):
    monkeypatch.setattr(compilers, "installed", lambda name: True)
    monkeypatch.setattr(metadata, "version", {"libtpu": installed, "jax": "0.10.2"}.__getitem__)
    asked = ["numpy>=2.0", 'libtpu==0.0.42.*; extra == "tpu"']
    monkeypatch.setattr(metadata, "requires", {"jax": asked}.__getitem__)
    for name in GIVEN:
        monkeypatch.setenv(name, "")
    said = r'got libtpu 0.0.52, expected ==0.0.42.\* as jax 0.10.2 asks for: pip install "jax\[tpu'
    with pytest.raises(InputError, match=said) if refused else nullcontext():
        configure_compiler(CHIPS["v5e"])
    assert all(os.environ[name] for name in GIVEN) != refused
