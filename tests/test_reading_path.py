"""How much code one reads to follow a call: the files whose functions it enters.

The networks (models/, nn/) and core/ are left out, empty lines are not counted, nor are properties
that `isinstance` reads to compare an object with a protocol, as the tests' type checker does. The
bounds may only fall.
"""

import pathlib
import re
import sys
import threading
import typing

import jax
import pytest
import tiny
from captioned_images import write_folder

import jaxdiff
from jaxdiff.cli import cache_latents
from jaxdiff.training import DataConfig, DiffusionObjective, TrainConfig

PACKAGE = pathlib.Path(jaxdiff.__file__).parent
LEFT_OUT = {"models", "nn", "core"}
CHECKER = re.compile("beartype|typechecker")


class Calls:
    """Calls of Python functions, in all threads that start inside the context."""

    def __init__(self):
        self.files, self.of_main_thread = set(), set()

    def __enter__(self):
        main = threading.get_ident()

        def profile(frame, event, _):
            caller = frame.f_back
            while caller is not None and CHECKER.search(caller.f_code.co_filename):
                caller = caller.f_back
            if caller is not None and caller.f_code.co_filename == typing.__file__:
                return
            if event == "call" and frame.f_code.co_name != "<module>":
                self.files.add(frame.f_code.co_filename)
                if threading.get_ident() == main:
                    self.of_main_thread.add(frame.f_code.co_filename)

        self.before = sys.getprofile()
        threading.setprofile(profile)
        sys.setprofile(profile)
        return self

    def __exit__(self, *_):
        sys.setprofile(self.before)
        threading.setprofile(None)


def lines_of(files):
    """Of the package's files among `files` the numbers of lines."""
    paths = [pathlib.Path(name) for name in files if name.startswith(str(PACKAGE))]
    return {
        str(path.relative_to(PACKAGE)): sum(
            bool(line.strip()) for line in path.read_text().splitlines()
        )
        for path in sorted(paths)
        if path.relative_to(PACKAGE).parts[0] not in LEFT_OUT
    }


def files_entered(call):
    """The package's files whose functions `call` enters, with their numbers of lines."""
    with Calls() as calls:
        call()
    return lines_of(calls.files)


@pytest.mark.parametrize(("max_files", "max_lines"), [(18, 3080)])
def test_from_prompt_to_pixels(tmp_path, max_files, max_lines):
    pipe = jaxdiff.load(tiny.write_tiny(tmp_path / "tiny"))
    jax.clear_caches()
    read = files_entered(lambda: pipe("a red star", steps=2))
    assert "samplers/base.py" in read
    assert len(read) <= max_files, read
    assert sum(read.values()) <= max_lines, read


@pytest.fixture(scope="module")
def second_step(tmp_path_factory):
    """The files that the second step of a training enters: in the loop's thread, and in all.

    From the batch to the log line, on cached latents, traced anew.
    """
    folder = tmp_path_factory.mktemp("step")
    model, images = tiny.write_tiny(folder / "model"), write_folder(folder / "images", 24)
    size = ("--resolution", "16", "--bucket-multiple", "8")
    latents = folder / "latents"
    cache_latents.run([str(model), str(latents), "--kind", "folder", "--path", str(images), *size])
    config = TrainConfig(
        objective=DiffusionObjective(pipeline=str(model)),
        data=DataConfig(kind="latents", path=str(latents)),
        steps=4,
        batch_size=8,
        log_every=1,
        sample_every=0,
    )
    entered = []

    def callback(step, _):
        if step == 1:
            jax.clear_caches()
            calls.files.clear()
            calls.of_main_thread.clear()
        elif step == 2:
            entered.extend([lines_of(calls.of_main_thread), lines_of(calls.files)])

    with Calls() as calls, jax.numpy_dtype_promotion("standard"):
        jaxdiff.train(config, folder / "work", progress=False, callback=callback)
    return entered


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "max_files", "max_lines"), [("loop", 12, 2000), ("all", 20, 2800)]
)
def test_a_training_step(second_step, threads, max_files, max_lines):
    """Threads prepare later batches meanwhile: reading and decoding is theirs."""
    read = second_step[threads == "all"]
    assert "training/step.py" in read
    assert len(read) <= max_files, read
    assert sum(read.values()) <= max_lines, read
