"""Plans from end to end, where the compilers are installed."""

import json
import subprocess
import sys

import pytest

from jaxdiff.nn.platforms import has_cudnn

pytestmark = pytest.mark.slow

CONFIG = """
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.training.config import TrainConfig, VAEObjective

config = TrainConfig(
    objective=VAEObjective(
        model=AutoencoderKLConfig(
            block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, sample_size=64
        )
    ),
    steps=10,
    batch_size=32,
    dtype="bfloat16",
)
"""


for_gpus = pytest.mark.skipif(not has_cudnn(), reason="needs jax[cuda13], which compiles for GPUs")


def planned(folder, topology):
    (folder / "config.py").write_text(CONFIG)
    plan = said("train.py", str(folder / "config.py"), "--plan", topology)
    assert not (folder / "checkpoints").exists()
    return plan


def said(*command):
    done = subprocess.run(
        [sys.executable, *command, "--no-find-max-batch", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(done.stdout)["plans"]
    return plan


@for_gpus
def test_a_training_on_four_gpus(tmp_path):
    plan = planned(tmp_path, "h200:4")
    assert plan["fits"]
    assert plan["argument_bytes"] > 4 * plan["held_bytes"]["weights"]  # two moments more, a batch
    assert plan["sent_bytes"]["all-reduce"] >= 2 * 3 / 4 * plan["held_bytes"]["weights"] / 2


@for_gpus
def test_drawing_on_two_gpus():
    plan = said("generate.py", "--plan", "h200:2", "--model", "jaxdiff/assets/scenes")
    assert plan["fits"]
    assert plan["batch_size"] == 8
    assert plan["sent_bytes"] == {}
    assert plan["loops_counted_once"] == 0
    assert list(plan["programs"]) == ["text_encoders", "loop", "decoder"]
    assert all(each["fits"] for each in plan["programs"].values())


def test_drawing_on_four_chips():
    pytest.importorskip("libtpu", reason="needs libtpu, the TPU compiler")
    plan = said("generate.py", "--plan", "v5e:2x2", "--model", "jaxdiff/assets/scenes")
    programs = plan["programs"]
    assert list(programs) == ["text_encoders", "loop", "decoder"]
    assert plan["batch_s"] == sum(each["seconds"] for each in programs.values())
    assert programs["loop"]["seconds"] == plan["steps"] * plan["step_s"]
    assert plan["images_per_s"] == 8 / plan["batch_s"]
    for each in programs.values():
        assert 0 < each["utilisation"] < 1
        assert each["total_bytes"] > plan["held_bytes"]["weights"]


def test_a_training_on_four_chips(tmp_path):
    pytest.importorskip("libtpu", reason="needs libtpu, the TPU compiler")
    plan = planned(tmp_path, "v5e:2x2")
    assert plan["fits"]
    assert plan["chips"] == 4
    assert 0 < plan["held_bytes"]["weights"] == plan["held_bytes"]["ema"]
    assert plan["argument_bytes"] > 4 * plan["held_bytes"]["weights"]  # two moments more, a batch
    # At least the gradients once around the ring and back, in bfloat16, half of the weights' width.
    assert plan["sent_bytes"]["all-reduce"] >= 2 * 3 / 4 * plan["held_bytes"]["weights"] / 2
    assert plan["kernel_cycles"] > 0  # of attention over 64 x 64 pixels, scheduled by itself
    assert plan["not_estimated"] == []
    assert 0 < plan["utilisation_apart"] <= plan["utilisation"] < 1
