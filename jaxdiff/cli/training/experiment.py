"""What a training reads, shows and leaves behind, whatever its objective."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from jaxdiff.checkpoints.atomic import new_file
from jaxdiff.core.types import Array, Float, NDArray, PyTree
from jaxdiff.data.batches import Batch, Item, batches
from jaxdiff.data.scenes import SceneSource
from jaxdiff.parallel.mesh import batch_sharding, data_mesh, place, replicated
from jaxdiff.parallel.processes import is_first
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.objectives import Learner, Params

CHECKPOINTS = "checkpoints"  # their folder in a workdir
SHOWN = 16  # pictures in a sample grid
VALIDATED = 256  # validation pictures behind a number in the log

Transform = Callable[[Sequence[Item]], Batch]


class Experiment(NamedTuple):
    """One objective wired up. `sample` and `export` are given EMA weights."""

    learner: Learner
    frozen: PyTree  # the weights that the loss reads and nothing changes
    batches: Any  # a Batches that also has set_state
    sample: Callable[[int, Params], Mapping[str, float]]  # writes a grid, returns measures
    export: Callable[[Params, pathlib.Path], None]  # writes into this folder
    identity: Mapping[str, str] = {}  # fingerprints of what must not change on the way


def training_batches(
    config: TrainConfig,
    tokenizer: Any = None,
    *,
    transform: Transform | None = None,
    process_count: int | None = None,
) -> Any:
    """This process's share of the endless training batches; the options are those of `batches`.

    With `process_count` 1 it is everything, on each of them.
    """
    count = jax.process_count() if process_count is None else process_count
    source = SceneSource(seed=config.data.seed, variations=config.data.variations)
    return batches(
        source,
        batch_size=config.batch_size,
        tokenizer=tokenizer,
        transform=transform,
        process_index=jax.process_index() % count,
        process_count=count,
    )


def validation_batch(
    config: TrainConfig, tokenizer: Any = None, *, transform: Transform | None = None
) -> dict[str, NDArray]:
    """VALIDATED items, the same at every call; with variations the first of each block is new.

    It is of the validation split, and the minimal changes of it that follow are any scenes.
    """
    source = SceneSource(
        seed=config.data.seed, split="validation", variations=config.data.variations
    )
    return next(batches(source, batch_size=VALIDATED, tokenizer=tokenizer, transform=transform))


def spread(batch: Mapping[str, NDArray]) -> dict[str, Array]:
    """`batch` shared out over all devices if they divide it, so that each computes its part only.

    A batch that they do not divide goes whole to each of them. All processes have the same one.
    """
    mesh = data_mesh()
    shared = all(len(array) % mesh.size == 0 for array in batch.values())
    where = batch_sharding(mesh) if shared else replicated(mesh)
    return {name: place(array, where) for name, array in batch.items()}


def grid(images: Float[NDArray, "n h w c"], columns: int) -> Image.Image:
    """Pictures in [-1, 1] row by row, as one picture."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    canvas = np.ones((rows * columns, h, w, c), np.float32)
    canvas[:n] = images
    joined = canvas.reshape(rows, columns, h, w, c).swapaxes(1, 2)
    pixels = np.round((joined.reshape(rows * h, columns * w, c).clip(-1, 1) + 1) * 127.5)
    return Image.fromarray(pixels.astype(np.uint8))


def save_grid(folder: pathlib.Path, step: int, picture: Image.Image) -> None:
    """Write `folder`/step_XXXXXX.png, whole or not at all; of several processes the first does."""
    if not is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / f"step_{step:06d}.png") as temporary:
        picture.save(temporary, format="PNG")
