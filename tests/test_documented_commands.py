"""Every command in README.md, docs/ and the docstrings of configs/ can be run as it stands.

Its options exist. Words in capitals stand for names and paths of the reader's own; other paths are
there, or a command has written them.
"""

import argparse
import functools
import pathlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable

import pytest
import tyro

from jaxdiff.cli import main

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))),
    *sorted((ROOT / "configs").glob("*.py")),
)
OURS = ("python", "jaxdiff", "make")
OTHERS = ("python3", "cd", "git", "mkdir", "pip", "source", "sudo", "tensorboard")
NAMES = r"(?:[A-Z_]+=\S+ +)*(?:" + "|".join((*OURS, *OTHERS)) + ")"
CONFIG = "configs/scenes_unet.py"  # in place of the word
MODULES = ("pytest", "venv")  # of others, for `python -m`
PATH = re.compile(r"[\w.~-]+(?:/[\w.-]*)+|[\w-]+\.(?:py|png|jsonl?|txt|safetensors|ckpt|ttf)")
WRITTEN = re.compile(r"(runs|data|\.venv)/.*|.*[a-z]\.png")  # by the command or one before it
PARSER = re.compile(r"argparse|tyro")
HUB = re.compile(
    r"(stable-diffusion-v1-5|stabilityai)/stable-diffusion-[\w.-]+|black-forest-labs/FLUX\.1-dev"
    r"|facebook/DiT-XL-2-256|DeepFloyd/IF-I{1,2}-X?L-v1.0"
)


def commands(page: pathlib.Path) -> list[str]:
    """The commands of a page: indented lines, and what has options between backquotes."""
    text = page.read_text()
    if page.suffix == ".py":
        text = text.split('"""')[1]
    text = re.sub(r"^```python\n.*?^```", "", text, flags=re.M | re.S)
    inline = re.findall(rf"`({NAMES} [^`]*--[^`]*)`", text)
    joined = text.replace("\\\n", " ")
    return [*re.findall(rf"^    ({NAMES} .*)$", joined, flags=re.M), *inline]


def words_of(command: str) -> list[str]:
    """Its words, without the environment before them and a comment behind them."""
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    return [CONFIG if word == "CONFIG" else word for word in words]


class ParsedError(Exception):
    """Raised in place of what a command does once it has read its options."""


@pytest.fixture
def parse_only(monkeypatch):
    """Commands raise ParsedError once they have read their options."""
    parse_args, cli = argparse.ArgumentParser.parse_args, tyro.cli

    def parsed(*arguments):
        parse_args(*arguments)
        raise ParsedError

    def parsed_by_tyro(options, *arguments, **choices):
        def stop(*_, **__):
            raise ParsedError

        if isinstance(options, type):
            cli(options, *arguments, **choices)
        else:  # a function that takes the options
            cli(functools.wraps(options)(stop), *arguments, **choices)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(tyro, "cli", parsed_by_tyro)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    return monkeypatch


def runner(words: list[str], monkeypatch) -> Callable[[], object] | None:
    """What runs a command of this project; None for one without options of ours."""
    if words[0] == "jaxdiff":
        words = ["python", "-m", *words]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    if words[0] != "python" or (words[1] == "-m" and words[2] in MODULES):
        return None
    if words[1:] == ["-m", "jaxdiff", "--help"]:
        return None
    if words[1:3] == ["-m", "jaxdiff"]:
        assert words[3] in main.COMMANDS
        return lambda: main.run(words[3], words[4:])
    if words[1] in ("train.py", "generate.py"):
        return lambda: main.run(words[1].removesuffix(".py"), words[2:])
    if not PARSER.search((ROOT / words[1]).read_text()):
        return None
    monkeypatch.setattr(sys, "argv", words[1:])
    return lambda: runpy.run_path(words[1], run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_exist(page, parse_only, capsys):
    for command in commands(page):
        words = words_of(command)
        if any(f"\n# {word}\n" in page.read_text() for word in words):
            continue  # a file that the page has: see test_extending.py
        run = runner(words, parse_only)
        if run is None:
            continue
        try:
            code = run()
        except ParsedError:
            continue
        except SystemExit as ended:
            code = ended.code
        pytest.fail(f"{command}: exit code {code}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist_or_are_in_capitals(page):
    text = page.read_text()
    for command in commands(page):
        for word in words_of(command):
            path = re.sub(r":[\d.]+$", "", word)  # the scale of a LoRA
            if not PATH.fullmatch(path) or path.startswith("/usr/"):
                continue
            known = HUB.fullmatch(path) or WRITTEN.fullmatch(path) or f"# {path}\n" in text
            known = known or re.fullmatch(r"\d+/\d+", path)  # a shard
            capitals = re.match(r"[A-Z]+(?![a-z])", path)
            assert known or capitals or (ROOT / path).exists(), f"{command}: {word}"
