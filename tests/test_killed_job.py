"""A job of images that is killed and started again ends as if it had never stopped.

    JAXDIFF_KILLS=30 python -m pytest tests/test_killed_job.py

kills it thirty times instead of three.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny
from on_devices import environment
from PIL import Image

from jaxdiff.generation.png_files import read_settings
from jaxdiff.generation.shards import Shard

ROOT = pathlib.Path(__file__).parents[1]
KILLS = int(os.environ.get("JAXDIFF_KILLS", "3"))
LINES = 12 * KILLS
SHARDS = 4


def start(folder, output, *arguments):
    """The command in a process of its own, on one CPU device."""
    command = ["generate.py", "--prompts", str(folder / "lines.jsonl"), "--output", str(output)]
    options = ["--model", str(folder / "model"), "--batch-size", "2", "--json", *arguments]
    return subprocess.Popen(
        [sys.executable, "-W", "error", *command, *options],
        cwd=ROOT,
        env=environment(1, folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def images(output):
    """The files of images, by name."""
    return {path.name: path.read_bytes() for path in output.rglob("*.png")}


@pytest.mark.slow
def test_killed_and_resumed_every_line_is_there_once(tmp_path):
    tiny.write_tiny(tmp_path / "model")
    lines = [{"prompt": f"a red star {i}", "seed": i % 3} for i in range(LINES)]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _, said = start(tmp_path, whole).communicate()
    assert len(images(whole)) == LINES, said

    seed = random.randrange(10**6)
    chance = random.Random(seed)
    for _ in range(KILLS):
        process, before = start(tmp_path, cut), len(images(cut))
        wanted, deadline = before + chance.randint(0, 12), time.monotonic() + 120
        while process.poll() is None and len(images(cut)) < wanted:
            assert time.monotonic() < deadline
        time.sleep(chance.random() * (3 if wanted == before else 0.02))
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), f"seed {seed}"
        for name in images(cut):
            with Image.open(cut / name) as image:
                image.load()
            assert read_settings(cut / name), f"{name} has no settings, seed {seed}"

    process = start(tmp_path, cut)
    report, said = process.communicate()
    assert process.returncode == 0, said
    assert json.loads(report)["count"] == LINES
    assert images(cut) == images(whole), f"seed {seed}"
    assert sorted(p.name for p in cut.iterdir()) == sorted([".jobs", *images(whole)])


@pytest.mark.slow
def test_killed_shards_make_every_image_once(tmp_path):
    tiny.write_tiny(tmp_path / "model")
    count = SHARDS * Shard().unit_size + 2 * KILLS  # units of all shards
    lines = [{"prompt": f"a red star {i}", "seed": i % 3, "steps": 1 + i % 3} for i in range(count)]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _, said = start(tmp_path, whole, "--shard", "0/1").communicate()
    assert len(images(whole)) == count, said

    seed = random.randrange(10**6)
    chance = random.Random(seed)
    for _ in range(KILLS):
        running = [start(tmp_path, cut, "--shard", f"{i}/{SHARDS}") for i in range(SHARDS)]
        wanted, deadline = len(images(cut)) + chance.randint(0, 30), time.monotonic() + 120
        while len(images(cut)) < wanted and any(each.poll() is None for each in running):
            assert time.monotonic() < deadline
        time.sleep(chance.random() * 0.05)
        for process in running:
            process.kill()
            process.communicate()
            assert process.returncode in (-signal.SIGKILL, 0), f"seed {seed}"
        for path in cut.rglob("*.png"):
            assert read_settings(path), f"{path.name} is not whole, seed {seed}"

    counts = []
    for i in range(SHARDS):
        process = start(tmp_path, cut, "--shard", f"{i}/{SHARDS}")
        report, said = process.communicate()
        assert process.returncode == 0, said
        counts.append(json.loads(report)["count"])
    assert counts == [
        sum(Shard(i, SHARDS).owns(line) for line in range(count)) for i in range(SHARDS)
    ]
    assert images(cut) == images(whole), f"seed {seed}"
    assert not [path for path in cut.rglob("*") if path.suffix == ".tmp"]
