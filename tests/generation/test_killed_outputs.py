"""A process that writes images, is killed at any moment and started again, writes each once."""

import base64
import collections
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tarfile
import time

import image_jobs
import pytest
from PIL import Image

from jaxdiff.generation.image_files import read_settings, settings_in
from jaxdiff.generation.open_output import open_output

KILLS = int(os.environ.get("JAXDIFF_KILLS", "3"))
LINES = 60 * KILLS
ROOT = pathlib.Path(image_jobs.__file__).parents[1]


def start(where, container):
    command = [sys.executable, image_jobs.__file__, str(where), container, str(LINES)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def folder_seeds(where):
    """The seeds of all images; each file is whole."""
    stored = [read_settings(path) for path in where.rglob("*.png")]
    assert None not in stored
    return [settings["seed"] for settings in stored]


def tar_seeds(where):
    seeds = []
    for path in where.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        for name, data in members.items():
            if name.endswith(".json"):
                seeds.append(json.loads(data)["seed"])
            else:
                assert settings_in(io.BytesIO(data), source=name)["seed"] is not None
        assert len(members) == 2 * len({name.split(".")[0] for name in members})
    return seeds


def openai_seeds(where):
    """Those of the lines that are whole; the last one of a killed process may be cut."""
    seeds = []
    path = where / "in_output.jsonl"
    for line in path.read_bytes().splitlines(True) if path.exists() else ():
        if line.endswith(b"\n"):
            data = json.loads(line)["response"]["body"]["data"]
            images = [io.BytesIO(base64.b64decode(each["b64_json"])) for each in data]
            assert len(images) == image_jobs.PER_LINE
            seeds += [settings_in(image, source="")["seed"] for image in images]
    return seeds


SEEDS = {"folder": folder_seeds, "tar": tar_seeds, "openai": openai_seeds}


@pytest.mark.parametrize("container", SEEDS)
def test_killed_and_resumed_every_image_is_there_once(tmp_path, container):
    seed = random.randrange(10**6)
    chance, where = random.Random(seed), tmp_path / "out"
    for kill in range(KILLS):
        process = start(where, container)
        if kill % 3 != 2:  # else also while it starts
            assert process.stdout.readline() == "begun\n"
        time.sleep(chance.random() * 0.4)
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)[: kill + 1], f"seed {seed}"
        SEEDS[container](where)
    process = start(where, container)
    process.communicate()
    assert process.returncode == 0
    wanted = [
        10 * index + number for index in range(LINES) for number in range(image_jobs.PER_LINE)
    ]
    assert sorted(SEEDS[container](where)) == wanted, f"seed {seed}"
    check_manifest(where, wanted, container)


def check_manifest(where, wanted, container):
    """Each image has one line, about a file that is there; nothing unfinished is left."""
    (path,) = (where / ".jobs" / image_jobs.KEY).iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    entries = [line for line in lines if "index" in line]
    counts = collections.Counter((entry["index"], entry["number"]) for entry in entries)
    assert set(counts.values()) == {1}
    assert len(entries) == len(wanted) // (image_jobs.PER_LINE if container == "openai" else 1)
    if container == "folder":
        for entry in entries:
            assert (where / entry["file"]).stat().st_size == entry["size"]
            with Image.open(where / entry["file"]) as image:
                assert image.size == (entry["width"], entry["height"])
    assert not list(where.rglob("*.part"))
    output = open_output(where, key=image_jobs.KEY, container=container, prompts="in.jsonl")
    assert len(output.manifest) == len(wanted)
    output.close()
