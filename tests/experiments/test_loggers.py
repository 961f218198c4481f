"""Every log has each step once, with its values and its picture, and says what is missing."""

import errno
import io
import os
import struct
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboardX.proto import event_pb2

from jaxdiff.core.errors import InputError, WriteError
from jaxdiff.experiments.loggers import (
    JsonlLog,
    MetricLoggers,
    Terminal,
    import_wandb,
    read_lines,
)
from jaxdiff.experiments.trainer import memory_use
from jaxdiff.training.config import TrainConfig, VAEObjective


def config_of(**fields):
    return TrainConfig(objective=VAEObjective(), steps=9, batch_size=2, **fields)


def events(folder):
    """The events of all files, oldest first: records of length, checksum, message, checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def picture(folder):
    path = folder / "samples.png"
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path)
    return path


def test_lines_and_event_files_have_the_same_values(tmp_path):
    with MetricLoggers(config_of(), tmp_path, step=0) as logs:
        logs(1, {"loss": 0.5, "grad_norm": 2.0})
        logs(2, {"loss": 0.25}, picture(tmp_path))
    assert read_lines(tmp_path / "log.jsonl") == [
        {"step": 1, "loss": 0.5, "grad_norm": 2.0},
        {"step": 2, "loss": 0.25},
    ]
    values = [(e.step, v) for e in events(tmp_path / "tensorboard") for v in e.summary.value]
    scalars = {(step, v.tag): v.simple_value for step, v in values if not v.image.width}
    assert scalars == {(1, "loss"): 0.5, (1, "grad_norm"): 2.0, (2, "loss"): 0.25}
    assert [(s, v.tag, v.image.height) for s, v in values if v.image.width] == [(2, "samples", 4)]


def test_what_lies_beyond_the_checkpoint_is_taken_back(tmp_path):
    with MetricLoggers(config_of(), tmp_path, step=0) as logs:
        for step in (1, 2, 3):
            logs(step, {"loss": 1.0})
    with MetricLoggers(config_of(), tmp_path, step=2) as logs:
        logs(3, {"loss": 2.0})
    # TensorBoard drops what was written before for steps from that of a START on
    starts = [
        e.step for e in events(tmp_path / "tensorboard") if e.session_log.status == 1 and e.step
    ]
    assert starts == [3]


def test_a_full_disk_is_heard_of_at_once(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricLoggers(config_of(), tmp_path, step=0) as logs:
        monkeypatch.setattr(os, "fsync", full)
        message = f"^{tmp_path}: got no space left on device, expected a disk to write logs to$"
        for step in range(1, 20):
            with pytest.raises(WriteError, match=message):
                logs(step, {"loss": 0.5})


def test_tensorboard_can_be_left_out(tmp_path):
    with MetricLoggers(config_of(tensorboard=False), tmp_path, step=0) as logs:
        logs(1, {"loss": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


class Run:
    """A run that notes what it is told."""

    def __init__(self, **how):
        self.how, self.told, self.finished = how, [], False

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.finished = True


def test_weights_and_biases_goes_on_with_its_run(tmp_path, monkeypatch):
    runs = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **how: runs.append(Run(**how)) or runs[-1]
    fake.util = types.SimpleNamespace(generate_id=lambda: f"id{len(runs)}")
    fake.Image = lambda path: ("picture", path)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = config_of(wandb="emoji", tensorboard=False)
    for start in (0, 1):
        with MetricLoggers(config, tmp_path, step=start) as logs:
            logs(start + 1, {"loss": 0.5}, picture(tmp_path))
    first, second = runs
    assert first.how["id"] == second.how["id"] == "id0"
    assert first.how["project"] == "emoji"
    assert first.how["config"]["batch_size"] == 2
    samples = ("picture", str(tmp_path / "samples.png"))
    assert first.told == [(1, {"loss": 0.5, "samples": samples})]
    assert first.finished


def test_without_the_package_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"^wandb: got no such package, .*pip install wandb$"):
        import_wandb()


def test_memory_of_a_device_that_tells(monkeypatch):
    assert memory_use() == {}
    told = {"peak_bytes_in_use": 3 * 10**9, "bytes_limit": 12 * 10**9}
    device = types.SimpleNamespace(memory_stats=lambda: told)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert memory_use() == {"hbm_peak_gb": 3.0, "hbm_share": 0.25}


def test_lines_beyond_the_restored_step_go(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonlLog(path, step=0)
    for step in (1, 2, 3):
        log(step, {"loss": 1.0 / step})
    JsonlLog(path, step=2)(3, {"loss": 5.0})
    assert read_lines(path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 5.0},
    ]


def test_a_line_cut_short_goes(tmp_path):
    path = tmp_path / "log.jsonl"
    JsonlLog(path, step=0)(1, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    JsonlLog(path, step=2)(2, {"loss": 2.0})
    assert [line["step"] for line in read_lines(path)] == [1, 2]


VALUES = {"loss": 0.25, "step_ms": 12.0, "images_per_s": 640.4, "data_wait": 0.07, "l1": 0.1}


def shown(*, terminal: bool, **values: float) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    with Terminal(start=3, steps=10, console=console) as screen:
        screen.step(4)
        screen.values(4, values)
        screen.message("going on")
    return text.getvalue()


def test_plain_lines_without_a_terminal():
    line = "step 4/10  loss 0.2500  12 ms/step  640 images/s  waiting 7%"
    assert shown(terminal=False, **VALUES).splitlines() == [line, "going on"]


def test_measures_alone_are_a_line_too():
    assert "step 4/10  validation_psnr 31.5" in shown(terminal=False, validation_psnr=31.5)


def test_a_bar_with_the_same_numbers_in_a_terminal():
    text = shown(terminal=True, **VALUES)
    assert "4/10" in text
    assert "640 images/s" in text
    assert "left" in text
    assert "going on" in text
