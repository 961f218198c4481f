"""One training in two processes: killed, then ended by a single one on another mesh."""

import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from on_devices import environment

from jaxdiff.core.errors import InputError
from jaxdiff.experiments.loggers import read_lines
from jaxdiff.parallel import distributed
from jaxdiff.parallel.distributed import DistributedConfig, consensus, gather_to_host
from jaxdiff.parallel.mesh import data_mesh, device_put_global, make_mesh, replicated, shard_batch

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 12
CONFIG = f"""
import jaxdiff.experiments.experiment
import jaxdiff.experiments.vae
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.training.config import MESHES, TrainConfig, VAEObjective
model = AutoencoderKLConfig(block_out_channels=(8,), norm_num_groups=1, latent_channels=2,
    mid_block_add_attention=False)
config = TrainConfig(objective=VAEObjective(model=model), mesh=MESHES["fsdp"], steps={STEPS},
    batch_size=8, log_every=1, checkpoint_every=4, sample_every=6)
jaxdiff.experiments.experiment.VALIDATION_BATCH = 16
jaxdiff.experiments.vae.SCALE_ESTIMATION_IMAGES = 64
"""


def start(folder, name, devices, *options):
    """The train command on so many CPU devices, in a process of its own."""
    command = [sys.executable, "train.py", str(folder / "tiny.py"), "--workdir", str(folder / name)]
    return subprocess.Popen(
        [*command, *options],
        cwd=ROOT,
        env=environment(devices, folder),
        stderr=subprocess.PIPE,
        text=True,
    )


def meeting_place():
    """A host and port where processes can meet on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def pair(folder, name):
    """Two processes of four devices each that meet on this machine."""
    meeting = ("--coordinator", meeting_place(), "--num-processes", "2", "--process-id")
    return [start(folder, name, 4, *meeting, str(number)) for number in (0, 1)]


def ended(process):
    """The exit code and what was said."""
    _, said = process.communicate(timeout=400)
    return process.returncode, said


def losses(folder, name):
    lines = read_lines(folder / name / "log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


@pytest.mark.slow
def test_two_processes_then_one(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    code, said = ended(start(tmp_path, "one", 8))
    assert code == 0, said
    both, log = pair(tmp_path, "cut"), tmp_path / "cut" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 6):
        assert all(process.poll() is None for process in both), both[0].communicate()[1]
        time.sleep(0.01)
    both[1].send_signal(signal.SIGKILL)
    both[1].communicate()
    both[0].send_signal(signal.SIGKILL)  # or it waits for the other until JAX gives it up
    both[0].communicate()
    assert {path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()} >= {"4"}
    code, said = ended(start(tmp_path, "cut", 8, "--mesh.data", "2", "--mesh.fsdp", "4"))
    assert code == 0, said
    assert "resuming after step" in said
    np.testing.assert_allclose(losses(tmp_path, "cut"), losses(tmp_path, "one"), rtol=1e-4)
    one, cut = (tmp_path / name / "export" for name in ("one", "cut"))
    assert {p.name for p in one.iterdir()} == {p.name for p in cut.iterdir()}


@pytest.mark.slow
def test_two_processes_end_alike_and_only_the_first_speaks(tmp_path):
    """A signal to one of them stops both, at the same step."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    both, log = pair(tmp_path, "stopped"), tmp_path / "stopped" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert all(process.poll() is None for process in both), both[0].communicate()[1]
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)
    codes, texts = zip(*(ended(process) for process in both), strict=True)
    assert codes == (0, 0), texts
    assert "the same command resumes from there" in texts[0]
    assert "train:" not in texts[1]
    both = pair(tmp_path, "stopped")
    assert [ended(process)[0] for process in both] == [0, 0]
    losses(tmp_path, "stopped")
    assert (tmp_path / "stopped" / "export" / "config.json").exists()
    assert len(list((tmp_path / "stopped" / "samples").iterdir())) == 2


FULL = """
import errno, os, sys
from jaxdiff.experiments.loggers import JsonlLog
def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
if sys.argv[-1] == "0":
    JsonlLog.__call__ = full
"""


@pytest.mark.slow
def test_where_one_process_fails_none_waits_for_it(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG + FULL)
    both = pair(tmp_path, "full")
    try:
        (code, said), (other, _) = (ended(process) for process in both)
    finally:
        for process in both:
            process.kill()
    assert code == 1
    assert other != 0
    assert said.endswith("There is no checkpoint yet: the same command starts over\n"), said


@pytest.mark.slow
def test_what_one_process_cannot_read_none_goes_on_from(tmp_path):
    """The first could read step 2, of which the second finds its own part cut off."""
    store = tmp_path / "store"
    command = [sys.executable, "tests/restoring.py", str(store), meeting_place()]
    both = [
        subprocess.Popen(
            [*command, str(number)],
            cwd=ROOT,
            env=environment(1, tmp_path) | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    # Gloo says on the same stream who is connected.
    assert [out.splitlines()[-1:] for out, _ in said] == [["1"], ["1"]], said
    assert {path.name for path in store.iterdir()} == {"1", "2", "unreadable-2"}


def test_a_meeting_is_described_whole_or_not_at_all():
    assert DistributedConfig(coordinator="a:1", num_processes=2, process_id=1).process_id == 1
    with pytest.raises(InputError, match="expected all three or none"):
        DistributedConfig(coordinator="a:1")
    with pytest.raises(InputError, match="process_id: got 2, expected one from 0 to 1"):
        DistributedConfig(coordinator="a:1", num_processes=2, process_id=2)


@pytest.mark.parametrize(
    ("environment", "multiprocess"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_clusters_speak_of_company(environment, multiprocess):
    assert distributed._is_multiprocess(environment) == multiprocess


def test_arrays_come_back_whole():
    mesh = make_mesh(fsdp=8)
    value = np.arange(16.0, dtype=np.float32)
    tree = {
        "a": shard_batch({"x": value}, mesh)["x"],
        "b": device_put_global(value, replicated(mesh)),
    }
    for got in gather_to_host(tree).values():
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, value)


def test_one_process_answers_itself_at_once():
    answers = iter([False, True])
    asked = consensus(lambda: next(answers))
    assert [asked(), asked()] == [False, True]
    assert jax.process_count() == 1
    assert data_mesh().size == 8
