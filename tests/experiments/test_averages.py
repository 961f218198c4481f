"""Averages of any width are exported from the snapshots of a training, wherever it was cut."""

import dataclasses

import jax
import numpy as np
import pytest
from captioned_images import write_folder

from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.ema_snapshots import EMASnapshots
from jaxdiff.cli.train import run
from jaxdiff.core.errors import InputError
from jaxdiff.experiments import vae
from jaxdiff.experiments.loggers import read_lines
from jaxdiff.models.build import param_dict
from jaxdiff.parallel.chips import CHIPS
from jaxdiff.training import power_ema

pytestmark = pytest.mark.usefixtures("standard_promotion")
CONFIG = """
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.training.config import (
    DataConfig, EMAConfig, OptimiserConfig, TrainConfig, VAEObjective,
)
model = AutoencoderKLConfig(block_out_channels=(2,), norm_num_groups=1, latent_channels=2,
    mid_block_add_attention=False)
config = TrainConfig(objective=VAEObjective(model=model), steps=6, batch_size=8, log_every=3,
    checkpoint_every=2, sample_every=0, optimiser=OptimiserConfig(warmup_steps=1),
    ema=EMAConfig(power_stds=(0.05, 0.1), snapshot_every=2),
    data=DataConfig(kind="folder", path="FOLDER/in", resolution=8, bucket_multiple=8,
        validation_size=4,
        cache_dir="FOLDER/cache"))
"""


def exported(folder):
    return {p: np.asarray(a) for p, a in param_dict(read_component(folder).module).items()}


@pytest.mark.slow
def test_any_width_is_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "SCALE_ESTIMATION_IMAGES", 8)
    chip = dataclasses.replace(CHIPS["v4"], kind="cpu", peak_flops=1e9)
    monkeypatch.setitem(CHIPS, "cpu", chip)
    write_folder(tmp_path / "in", 24)
    (tmp_path / "tiny.py").write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    command = [str(tmp_path / "tiny.py"), "--workdir", str(tmp_path / "a")]
    run([*command, "--steps", "5", "--optimiser.decay-fraction", "0"])
    kept = EMASnapshots(tmp_path / "a" / "averages")
    # FLOPs of the model over time and peak: the same FLOPs in every line
    lines = read_lines(tmp_path / "a" / "log.jsonl")
    flops = [line["mfu"] * line["step_ms"] for line in lines]
    np.testing.assert_allclose(flops, flops[0])
    assert flops[0] > 0
    assert kept.steps() == [2, 4, 5]
    # Where a training goes on before its end, what it left beyond is made anew.
    for step in ("5", "4"):
        folder = tmp_path / "a" / "checkpoints" / step
        folder.rename(tmp_path / step)
    again = [*command, "--optimiser.decay-fraction", "0"]
    run(again)
    assert kept.steps() == [2, 4, 6]
    export = tmp_path / "a" / "export"
    plain = exported(export)
    shapes = {p: jax.ShapeDtypeStruct(a.shape, a.dtype) for p, a in plain.items()}
    snapshots = {s: kept.restore(s, {"0.05": shapes, "0.1": shapes}) for s in (2, 4, 6)}
    for width in (0.05, 0.08):
        run([*again, "--export-only", "--ema-std", str(width)])
        parts = power_ema.post_hoc_coefficients(
            [(s, w) for s in (2, 4, 6) for w in (0.05, 0.1)], 6, width
        )
        for path, array in exported(export).items():
            tables = [snapshots[s][w][path] for s in (2, 4, 6) for w in ("0.05", "0.1")]
            total = sum(f * np.asarray(t, np.float64) for f, t in zip(parts, tables, strict=True))
            np.testing.assert_allclose(array, total, rtol=1e-4, atol=1e-5)
    assert any(np.abs(array - plain[path]).max() > 1e-4 for path, array in exported(export).items())
    # The snapshot of a width that is kept is that average.
    (*_, last) = power_ema.post_hoc_coefficients(
        [(s, w) for s in (2, 4, 6) for w in (0.05, 0.1)], 6, 0.1
    )
    assert abs(last - 1) < 1e-6


@pytest.mark.slow
def test_without_snapshots_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "SCALE_ESTIMATION_IMAGES", 8)
    write_folder(tmp_path / "in", 24)
    text = CONFIG.replace("FOLDER", str(tmp_path)).replace(
        "power_stds=(0.05, 0.1), snapshot_every=2", ""
    )
    (tmp_path / "tiny.py").write_text(text.replace("steps=6", "steps=1"))
    command = [str(tmp_path / "tiny.py"), "--workdir", str(tmp_path / "a")]
    with pytest.raises(InputError, match=r"ema_std: got 0.1 for .* without snapshots"):
        run([*command, "--ema-std", "0.1"])
    assert not (tmp_path / "a").exists()
    run(command)
    assert not (tmp_path / "a" / "averages").exists()
    with pytest.raises(InputError, match=r"ema_std: got 0.1 for .* without snapshots"):
        run([*command, "--export-only", "--ema-std", "0.1"])
