"""What was cut off in the cache of compiled programs is removed when JAX stumbles on it."""

import os
import warnings
import zlib

import jax
import pytest

from jaxdiff.cli import main
from jaxdiff.pipeline import cache

PROGRAM = zlib.compress(os.urandom(1000))
WHOLE, CUT, EMPTY = (f"jit_step-{digit * 64}-cache" for digit in "0ab")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache folder, with programs and things that are none of ours."""
    contents = {WHOLE: PROGRAM, CUT: PROGRAM[:-100], EMPTY: b"", "my-cache": b"x", "y": b"x"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_what_was_cut_off_is_removed_and_nothing_else(folder):
    cache.prune_corrupt()
    assert names(folder) == {WHOLE, "my-cache", "y"}


def test_without_a_folder_nothing_is_touched(folder, monkeypatch):
    monkeypatch.chdir(folder)
    jax.config.update("jax_compilation_cache_dir", None)
    cache.prune_corrupt()
    assert CUT in names(folder)


def test_a_command_mends_when_jax_warns(folder, monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", main._warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("Something else", stacklevel=1)
        assert CUT in names(folder)
        said = "Error reading persistent compilation cache entry for 'jit_step': error: Error -5"
        warnings.warn(said, stacklevel=1)
    assert names(folder) == {WHOLE, "my-cache", "y"}
    assert f"warning: {said}" in capsys.readouterr().err
