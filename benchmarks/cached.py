"""What a training from cached latents loses to its data: beside one whose batches are there.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 PYTHONPATH=. \
        python benchmarks/cached.py [--texts embeddings] [--threads 1] [--pairs 4]

The network of configs/scenes_unet.py is trained twice by the loop of train.py: from latents that
`jaxdiff cache-latents` has made of scenes, through the files, the pipeline of grain and the
transfer to the devices, and from one batch that lies there. Step, state and loop are the same; the
two take turns, each of STEPS steps whose beginning is not timed, so that what was made ahead while
the other one ran does not count. Prints images per second of both, their ratio in each pair, and
the median of the ratios as a JSON object. Needs idle cores: about two minutes on two of them.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxdiff.checkpoints.training_state import TrainingStore
from jaxdiff.cli import cache_latents
from jaxdiff.cli.train import load_config
from jaxdiff.experiments.experiment import CHECKPOINTS
from jaxdiff.experiments.train import experiment
from jaxdiff.experiments.trainer import Trainer
from jaxdiff.parallel.mesh import shard_batch
from jaxdiff.scenes.source import SceneSource
from jaxdiff.training import loop
from jaxdiff.training.config import DataConfig, TrainConfig
from jaxdiff.training.loop import Prefetch

CONFIG = pathlib.Path("configs/scenes_unet.py")
MODEL = pathlib.Path("jaxdiff/assets/scenes")
IMAGES = 1024
SIDE = 64


class There:
    """One batch, again and again."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __next__(self) -> Any:
        return self._batch

    def get_state(self) -> Any:
        """No position."""
        return None


def cached(folder: pathlib.Path, texts: str) -> pathlib.Path:
    """Latents of scenes; they are made by the same command where they are missing."""
    images, latents = folder / "images", folder / f"latents-{texts}"
    if not (images / "metadata.jsonl").is_file():
        images.mkdir(parents=True, exist_ok=True)
        source, rows = SceneSource(seed=0), []
        for i in range(IMAGES):
            item = source[i]
            Image.fromarray(np.asarray(item["image"])).save(images / f"{i:05d}.png")
            rows.append(json.dumps({"file_name": f"{i:05d}.png", "text": item["caption"]}))
        (images / "metadata.jsonl").write_text("\n".join(rows))
    command = [str(MODEL), str(latents), "--kind", "folder", "--path", str(images)]
    options = ["--resolution", str(SIDE), "--texts", texts, "--batch-size", "64"]
    cache_latents.run([*command, *options])
    return latents


def chosen(latents: pathlib.Path, options: argparse.Namespace) -> TrainConfig:
    """The config, with a model that is there and nothing but steps."""
    config = load_config(CONFIG)
    changes: dict[str, Any] = {"vae": str(MODEL / "vae"), "text_encoder": str(MODEL)}
    return dataclasses.replace(
        config,
        objective=dataclasses.replace(config.objective, **changes),
        data=DataConfig(kind="latents", path=str(latents), threads=options.threads),
        sample_every=0,
        steps=1_000_000,
    )


class Turns:
    """Steps of one training, from whichever batches."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self._trainer, self._steps, self._state = trainer, steps, trainer.state
        self._frozen = trainer.experiment.load_frozen(trainer.program.frozen_shardings)

    def run(self, batches: Prefetch) -> Mapping[str, float]:
        """What the log says of the second half of the steps."""
        found: list[Mapping[str, float]] = []
        trainer, half = self._trainer, self._steps // 2
        self._state = loop.training_loop(
            trainer.program.step,
            self._state,
            self._frozen,
            batches,
            trainer.base_key,
            intervals=loop.Intervals(
                steps=int(self._state.step) + 2 * half,
                log=half,
                checkpoint=1 << 30,
                sample=0,
                max_nonfinite_steps=trainer.config.max_nonfinite_steps,
            ),
            images_per_step=trainer.config.batch_size,
            hooks=loop.Hooks(
                save=lambda step, state, position: None,
                log=lambda step, values: found.append(values),
            ),
        )
        return found[-1]


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/jaxdiff-cached"))
    parser.add_argument("--texts", choices=cache_latents.TEXTS, default="captions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    config = chosen(cached(options.folder, options.texts), options)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the first pair")
    with ExitStack() as stack:
        workdir = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = stack.enter_context(TrainingStore(workdir / CHECKPOINTS))
        parts = experiment(config, workdir)
        stack.callback(parts.batches.close)
        trainer = Trainer(config, workdir, store, parts)
        here = shard_batch(next(parts.batches), trainer.mesh)
        streams = {
            "latents": Prefetch(parts.batches, lambda batch: shard_batch(batch, trainer.mesh)),
            "there": Prefetch(There(here), lambda batch: batch),
        }
        for stream in streams.values():
            stack.enter_context(stream)
        turns, ratios = Turns(trainer, options.steps), []
        turns.run(streams["there"])  # compiles
        for pair in range(options.pairs):
            order = list(streams) if pair % 2 else list(streams)[::-1]
            values = {name: turns.run(streams[name]) for name in order}
            rates = {name: found["images_per_s"] for name, found in values.items()}
            ratios.append(rates["latents"] / rates["there"])
            text = ", ".join(f"{name} {rate:.1f} images/s" for name, rate in rates.items())
            waited = values["latents"]["data_wait"]
            print(f"{text}: {ratios[-1]:.3f}; waited for data {waited:.3f} of the time", flush=True)
    found = {
        "texts": options.texts,
        "devices": jax.device_count(),
        "load_after": os.getloadavg()[0],
        "ratios": [round(ratio, 4) for ratio in ratios],
        "ratio": float(np.median(ratios)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
