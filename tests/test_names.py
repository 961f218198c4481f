"""Every name in the code is defined, although linters are told to leave shape strings alone."""

import json
import pathlib
import subprocess
import sys
import tokenize

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("jaxdiff", "tests", "benchmarks", "configs", "docs", "train.py", "generate.py")


def strings(path: pathlib.Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the string literals of a file begin and end, as (row, column) counted from (1, 1)."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    return [
        ((t.start[0], t.start[1] + 1), (t.end[0], t.end[1] + 1))
        for t in tokens
        if t.type == tokenize.STRING
    ]


def test_every_name_is_defined():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821"]
    done = subprocess.run(
        [*command, "--no-cache", "--output-format", "json", *FOLDERS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    assert found, "shape strings alone give hundreds"
    spans = {name: strings(pathlib.Path(name)) for name in {each["filename"] for each in found}}
    undefined = []
    for each in found:
        at = (each["location"]["row"], each["location"]["column"])
        if not any(start <= at < end for start, end in spans[each["filename"]]):
            undefined.append(f"{each['filename']}:{at[0]}: {each['message']}")
    assert not undefined
