"""A training that is killed and started again ends as if it had never stopped, bit for bit.

    JAXDIFF_KILLS=50 python -m pytest tests/test_resume.py

kills it fifty times instead of five.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from on_devices import environment

from jaxdiff.experiments.loggers import read_lines

ROOT = pathlib.Path(__file__).parents[1]
KILLS = int(os.environ.get("JAXDIFF_KILLS", "5"))
STEPS = 20 * KILLS
CONFIG = f"""
import jaxdiff.experiments.vae
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.training.config import TrainConfig, VAEObjective
model = AutoencoderKLConfig(block_out_channels=(2,), norm_num_groups=1, latent_channels=2,
    mid_block_add_attention=False)
config = TrainConfig(objective=VAEObjective(model=model), steps={STEPS}, batch_size=2,
    log_every=1, checkpoint_every=4, sample_every=0)
jaxdiff.experiments.vae.SCALE_ESTIMATION_IMAGES = 64
"""
SPEED = {"step_ms", "images_per_s", "data_wait"}


class Run:
    """The train command in a process of its own, on one CPU device."""

    def __init__(self, folder: pathlib.Path, name: str, warnings: str = "error"):
        self.workdir = folder / name
        command = ["train.py", str(folder / "tiny.py"), "--workdir", str(self.workdir)]
        self.process = subprocess.Popen(
            [sys.executable, "-W", warnings, *command],
            cwd=ROOT,
            env=environment(1, folder),
            stderr=subprocess.PIPE,
            text=True,
        )

    def steps(self) -> int:
        """How many steps the log has."""
        log = self.workdir / "log.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written, by the temporary folder that it begins as."""
        return any(self.workdir.glob("checkpoints/*tmp*"))

    def saved(self) -> bool:
        """Whether there is a whole checkpoint: they are written while the training goes on."""
        return any(path.name.isdigit() for path in self.workdir.glob("checkpoints/*"))

    def until(self, condition) -> None:
        """Wait for `condition`; the training must not end before it."""
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.001)

    def until_training(self) -> None:
        """Wait until this process has taken a step: the log is new, and not only cut off."""
        initial = time.time()
        log = self.workdir / "log.jsonl"
        self.until(lambda: log.stat().st_mtime > initial)
        reached = self.steps()
        self.until(lambda: self.steps() > reached)

    def until_a_moment(self, chance: random.Random) -> None:
        """Wait for some moment while it starts, trains or saves."""
        kind = chance.choice(("start", "train", "save"))
        if kind == "start":
            time.sleep(chance.random() * 8)
            return
        self.until_training()
        wanted = self.steps() + chance.randrange(5)
        self.until(lambda: self.saving() if kind == "save" else self.steps() >= wanted)
        time.sleep(chance.random() * 0.01)

    def end(self, signal_number: int | None = None) -> tuple[int, str]:
        """Send the signal and wait; the exit code and what was said."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        _, said = self.process.communicate(timeout=60 * KILLS)
        return self.process.returncode, said


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of the last checkpoint: parameters, averages, optimiser, step."""
    folder = workdir.resolve() / "checkpoints" / str(STEPS) / "state"
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:
        shapes = reader.metadata(folder).item_metadata.tree
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
        )
        tree = reader.restore(folder, template)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    assert Run(tmp_path, "whole").end()[0] == 0
    seed = random.randrange(10**6)
    chance = random.Random(seed)

    # Killed while the first checkpoint is being written: nothing to go on from.
    run = Run(tmp_path, "cut")
    run.until(run.saving)
    assert run.end(signal.SIGKILL)[0] == -signal.SIGKILL

    # Killed while a later one is, with complete ones beside it.
    run = Run(tmp_path, "cut")
    run.until(run.saved)
    run.until(lambda: run.steps() >= 6)
    run.until(run.saving)
    run.end(signal.SIGKILL)

    # Killed at random moments: while it starts, trains or saves.
    for _ in range(KILLS - 2):
        run = Run(tmp_path, "cut")
        run.until_a_moment(chance)
        assert run.end(signal.SIGKILL)[0] == -signal.SIGKILL, f"seed {seed}"

    # Asked to stop: saves first, at a step that is no multiple of anything.
    run = Run(tmp_path, "cut")
    run.until(run.saved)
    run.until(lambda: run.steps() > 4)
    run.until_training()
    code, said = run.end(signal.SIGTERM)
    assert code == 0, said
    assert "the same command resumes from there" in said
    stopped = max(int(path.name) for path in run.workdir.glob("checkpoints/[0-9]*"))
    assert f"stopped after step {stopped};" in said

    # A damaged checkpoint gives way to the one before.
    for path in run.workdir.glob(f"checkpoints/{stopped}/state/d/*"):
        os.truncate(path, path.stat().st_size // 2)
    code, said = Run(tmp_path, "cut", warnings="default").end()
    assert code == 0, said
    assert f"warning: checkpoint {stopped} cannot be read (" in said
    assert "resuming after step" in said

    whole, cut = arrays(tmp_path / "whole"), arrays(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert len({name.split("'")[1] for name in whole}) == 4, "step, params, ema, opt_state"
    different = [name for name in whole if whole[name].tobytes() != cut[name].tobytes()]
    assert not different, f"seed {seed}"

    logs = [read_lines(tmp_path / name / "log.jsonl") for name in ("whole", "cut")]
    assert [line["step"] for line in logs[1]] == list(range(1, STEPS + 1))
    for first, second in zip(*logs, strict=True):
        assert {k: first[k] for k in first.keys() - SPEED} == {
            k: second[k] for k in second.keys() - SPEED
        }
    weights = "export/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "cut" / weights).read_bytes()
