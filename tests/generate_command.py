"""The generate command in the process of a test, with a tiny model that is read once."""

import functools
import re

import pytest
import tiny

import jaxdiff
from jaxdiff.cli import main
from jaxdiff.pipeline.load import load


@functools.cache
def load_once(name, dtype=None, mesh=None, prediction_type=None, vae=None, base=None, offload=None):
    """A model on one device with a linear UNet, and what earlier commands compiled for it."""
    pipe = load(name, dtype, prediction_type=prediction_type, vae=vae)
    return tiny.with_linear_unet(tiny.first_devices(pipe, 1))


def generate(model, output, *arguments):
    """Run the command in this process; returns its exit code.

    Models are read once, unless the command changes them.
    """
    command = [*arguments, "--model", str(model), "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        if not {"--vae", "--lora", "--textual-inversion", "--embedding"} & set(arguments):
            patch.setattr(jaxdiff, "load", load_once)
        return main.run("generate", command)


def stderr(capsys):
    """What was printed on stderr, without the phases of the work."""
    lines = capsys.readouterr().err.splitlines(keepends=True)
    return "".join(x for x in lines if not re.match("generate: (loading|compiling)", x))
