"""What the classifier of noisy latents tells, by noise level: python benchmarks/classifier.py

[--model FOLDER] [--classifier FOLDER] [--images 1024]

Prints the accuracy of the predicted attributes at each time of the schedule, for scenes none of
which was trained on: reserved ones, and those with pairs of colour and shape that were never seen.
The rows of several labels (sizes, colours, shapes) count where all of them are right.
"""

import argparse
import pathlib
from typing import cast

import jax
import jax.numpy as jnp

from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.embedded import EMBEDDED
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.pipelines import CLASSIFIER
from jaxdiff.checkpoints.schedulers import vp_schedule
from jaxdiff.core.types import Array
from jaxdiff.models.classifier import LatentClassifier
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.scenes.labels import collate_attributes
from jaxdiff.scenes.source import SceneSource
from jaxdiff.training.objectives.classifier import accuracies

TIMES = (0, 250, 500, 750, 850, 950)
BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, default=EMBEDDED, help="a diffusers folder")
    parser.add_argument("--classifier", type=pathlib.Path, help="default: classifier/ in the model")
    parser.add_argument("--images", type=int, default=1024)
    arguments = parser.parse_args()
    model = arguments.model
    folder = arguments.classifier or model / CLASSIFIER
    classifier = cast(LatentClassifier, read_component(folder, dtype=jnp.float32).module)
    vae = cast(AutoencoderKL, read_component(model / "vae", dtype=jnp.float32).module)
    schedule = vp_schedule(read_object(model / "scheduler/scheduler_config.json"))
    side = classifier.config.sample_size * vae.config.downscale

    @jax.jit
    def encode(image: Array) -> Array:
        return vae.scale(vae.encode(image)[0])

    @jax.jit
    def measure(x0: Array, targets: Array, known: Array) -> Array:
        return accuracies(classifier, schedule, x0, targets, known, TIMES, jax.random.key(0))

    names = classifier.config.group_names
    for split in ("validation", "heldout"):
        source = SceneSource(seed=1, split=split, size=side)
        batch = collate_attributes([source[i] for i in range(arguments.images)])
        parts = range(0, arguments.images, BATCH)
        x0 = jnp.concatenate([encode(batch["image"][i : i + BATCH]) for i in parts])
        table = measure(x0, batch["targets"], batch["known"])
        print(f"{split}\n{'':>14}" + "".join(f"{f't={t}':>8}" for t in TIMES))
        for name, row in zip(names, table.T, strict=True):
            print(f"{name:>14}" + "".join(f"{fraction:8.3f}" for fraction in row), flush=True)


if __name__ == "__main__":
    main()
