"""Commands end quietly where the reader of their output has gone."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from jaxdiff.cli import main
from jaxdiff.cli.main import CLOSED_PIPE

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "jaxdiff", "--help"],  # of the console script
        pytest.param(["generate.py", "--help"], marks=pytest.mark.slow),  # of tyro
        # a result
        pytest.param(
            ["-m", "jaxdiff", "inspect", "--json", "jaxdiff/assets/scenes"], marks=pytest.mark.slow
        ),
    ],
    ids=lambda command: command[1],
)
def test_a_closed_pipe_is_no_error(command):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, "")


def test_the_version_is_the_package_s(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxdiff", "--version"])
    main.main()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"jaxdiff {project['version']}\n"


def test_commands_that_import_jax_say_so_first_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main.run("convert", ["missing", "out"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "convert: loading"
    assert lines[1].startswith("convert: model: got missing")


@pytest.mark.parametrize("option", ["--model", "--lora", "--image", "--output"])
def test_a_name_that_no_file_can_have_is_one_sentence(option, capsys):
    assert main.run("generate", ["a", option, "x" * 5000]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"^generate: .*xxx.*(too long|characters)", error)
    assert len(error) < 400
