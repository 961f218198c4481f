"""What all kinds of training share: batches, validation split, sample grids."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from PIL import Image

from jaxdiff.checkpoints.components import abstract_component, read_component
from jaxdiff.checkpoints.loading import host_memory
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.pipelines import PipelineComponents
from jaxdiff.checkpoints.single_file import IncompleteFileError
from jaxdiff.checkpoints.tokenizers import TokenizerFiles, read_tokenizer
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float, NDArray, PyTree
from jaxdiff.data.bad_samples import BadSampleCounter
from jaxdiff.data.batches import Batch, BatchStream, Item, batches
from jaxdiff.experiments.datasets import dataset_captions, open_dataset
from jaxdiff.experiments.procedural import image_side, procedural_dataset
from jaxdiff.families.detection import family_of
from jaxdiff.models.build import param_dict
from jaxdiff.parallel.mesh import batch_sharding, data_mesh, device_put_global, replicated
from jaxdiff.training.config import (
    IMAGE_KINDS,
    PROCEDURAL_KINDS,
    CLIPObjective,
    DataConfig,
    DiffusionObjective,
    DistillationObjective,
    TrainConfig,
    VAEObjective,
)
from jaxdiff.training.program import TrainProgram, make_program
from jaxdiff.training.step import HostParams, Params, TrainingTask

CHECKPOINTS = "checkpoints"  # folder in a workdir
# The objectives that train on stored images; others need labels, which only rendered data have.
IMAGE_OBJECTIVES = (VAEObjective, CLIPObjective, DistillationObjective, DiffusionObjective)
GRID_SIZE = 16  # images in a sample grid
VALIDATION_BATCH = 256  # images behind a validation metric

Transform = Callable[[Sequence[Item]], Batch]


class ModelSource(NamedTuple):
    """How a training finds models whose weights are shapes; InputError for one that is missing."""

    component: Callable[..., nnx.Module]  # folder, dtypes -> its module
    pipeline: Callable[[str], PipelineComponents]
    tokenizers: Callable[[pathlib.Path], Mapping[str, TokenizerFiles]]


def _pipeline_in_files(source: str) -> PipelineComponents:
    try:
        parts = read_model(source, only=())
    except IncompleteFileError as error:
        raise InputError(
            f"{error.path}: got no {error.lacking}, expected a folder, which `jaxdiff convert "
            f"{source} FOLDER --base BASE` makes of this file (or with --vae FILE and "
            "--text-encoders FILE ... instead of --base)"
        ) from None
    family_of(parts, source)
    return parts


FILES = ModelSource(
    abstract_component,
    _pipeline_in_files,
    lambda folder: {"tokenizer": read_tokenizer(folder / "tokenizer")},
)


class Wiring(NamedTuple):
    """A training as shapes: all that planning needs, and what an `Experiment` runs."""

    task: TrainingTask
    frozen: PyTree  # shapes of weights that the loss or sampling reads and no update changes
    batch: Callable[[int], Mapping[str, jax.ShapeDtypeStruct]]  # of a batch size

    def program(self, config: TrainConfig, mesh: Mesh) -> TrainProgram:
        """The training on `mesh`; InputError for learning rate multipliers that match nothing."""
        return make_program(
            self.task,
            self.frozen,
            mesh,
            steps=config.steps,
            optimiser=config.optimiser,
            ema=config.ema,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            reshard_after_forward=config.mesh.reshard_after_forward,
        )


class Samples(NamedTuple):
    """What a training shows of its current weights."""

    metrics: Mapping[str, float]
    grid: Image.Image | None = None


class Experiment(NamedTuple):
    """A training with its data, weights, evaluation and export; the latter two get EMA weights."""

    wiring: Wiring
    load_frozen: Callable[[PyTree], PyTree]  # shardings -> the frozen weights, read and placed
    batches: BatchStream
    sample: Callable[[Params, PyTree], Samples]  # of parameters, frozen weights
    export: Callable[[HostParams, pathlib.Path], None]  # writes into this folder
    identity: Mapping[str, str] = {}  # added to the resume identity


def image_shapes(config: TrainConfig, n: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The images of a batch of n; squares, also where the data have buckets."""
    data = config.data
    side = image_side(data) if data.kind in PROCEDURAL_KINDS else data.resolution or 0
    return {"image": jax.ShapeDtypeStruct((n, side, side, 3), jnp.float32)}


def shapes_in(weights: Mapping[str, Any], dtype: Dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a table of weights, in `dtype`."""
    return {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in weights.items()}


def read_placed(
    folder: pathlib.Path, shardings: Mapping[str, jax.sharding.Sharding], dtype: Dtype
) -> dict[str, Array]:
    """Those weights of a component that `shardings` name, placed so; others stay on the host."""
    host = host_memory()
    found = read_component(folder, dtype=dtype, sharding=lambda path, _: shardings.get(path, host))
    return {path: x for path, x in param_dict(found.module).items() if path in shardings}


def training_batches(
    config: TrainConfig,
    tokenizer: Any = None,
    *,
    transform: Transform | None = None,
    process_count: int | None = None,
) -> BatchStream:
    """This process's share of the endless training batches; the options are those of `batches`.

    With `process_count` 1 it is the whole batch.
    """
    count = jax.process_count() if process_count is None else process_count
    data = config.data
    check_data_kind(config)
    if data.kind in PROCEDURAL_KINDS:
        source: Any = procedural_dataset(data.kind).open_source(data)
        skipped, identity = BadSampleCounter(), {}
    else:
        stored = open_dataset(data, config.batch_size, captions=_reads_captions(data, tokenizer))
        source, skipped, identity = stored.training, stored.skipped, {"data": stored.fingerprint}
        if count > 1:
            _check_same_data(stored.fingerprint)
    iterator = batches(
        source,
        batch_size=config.batch_size,
        tokenizer=tokenizer,
        transform=transform,
        process_index=jax.process_index() % count,
        process_count=count,
        threads=data.threads,
    )
    return BatchStream(iterator, skipped, identity)


def _reads_captions(data: DataConfig, tokenizer: Any) -> bool:
    """Whether the data's own captions are read."""
    return tokenizer is not None and data.caption is None


def check_data_kind(config: TrainConfig) -> None:
    """InputError unless the objective can train on this kind of data."""
    kinds = [*PROCEDURAL_KINDS]
    kinds += IMAGE_KINDS if isinstance(config.objective, IMAGE_OBJECTIVES) else ()
    kinds += ["latents"] if isinstance(config.objective, DiffusionObjective) else ()
    name = type(config.objective).__name__
    if config.data.kind not in kinds:
        raise InputError(
            f"data.kind: got {config.data.kind} for a {name}, expected {' or '.join(kinds)}"
        )
    if config.data.caption is not None and not isinstance(config.objective, DiffusionObjective):
        raise InputError(f"data.caption: got one for a {name}, expected none")


def _check_same_data(fingerprint: str) -> None:
    """InputError if this process has other data than the first one."""
    mine = np.frombuffer(bytes.fromhex(fingerprint), np.uint8)
    first = np.asarray(multihost_utils.broadcast_one_to_all(mine))
    if not np.array_equal(mine, first):
        raise InputError(
            f"data: got {fingerprint} in process {jax.process_index()}, expected "
            f"{first.tobytes().hex()} as process 0 has found: the same files for every process"
        )


def validation_batch(
    config: TrainConfig, tokenizer: Any = None, *, transform: Transform | None = None
) -> dict[str, NDArray]:
    """A batch of the validation split, the same at every call.

    Of procedural data it has VALIDATION_BATCH items, of stored data those that
    `data.validation_size` keeps from training.
    """
    data, count = config.data, VALIDATION_BATCH
    if data.kind in PROCEDURAL_KINDS:
        source: Any = procedural_dataset(data.kind).open_source(data, "validation")
    else:
        check_data_kind(config)
        stored = open_dataset(data, config.batch_size, captions=_reads_captions(data, tokenizer))
        source, count = stored.validation, stored.validation_size
    iterator = batches(source, batch_size=count, tokenizer=tokenizer, transform=transform)
    batch = next(iterator)
    iterator.close()
    return batch


def training_captions(config: TrainConfig) -> Iterator[str]:
    """All captions in the order of the source; those of procedural data have no end."""
    data = config.data
    if data.kind in PROCEDURAL_KINDS:
        return procedural_dataset(data.kind).captions(data)
    return dataset_captions(data)


def validation_captions(config: TrainConfig, count: int) -> list[str]:
    """`count` captions of the validation split, repeated if it has fewer."""
    captions = config.data.caption is None
    stored = open_dataset(config.data, config.batch_size, captions=captions)
    return [stored.validation[i % stored.validation_size]["caption"] for i in range(count)]


def grid_prompts(config: TrainConfig) -> list[str]:
    """GRID_SIZE prompts of sample grids, which are not trained on."""
    data = config.data
    if data.kind in PROCEDURAL_KINDS:
        return procedural_dataset(data.kind).grid_prompts(GRID_SIZE)
    return validation_captions(config, GRID_SIZE)


def shard_or_replicate(batch: Mapping[str, NDArray]) -> dict[str, Array]:
    """`batch` sharded over all devices if they divide it, else replicated.

    All processes have the same batch.
    """
    mesh = data_mesh()
    divisible = all(len(array) % mesh.size == 0 for array in batch.values())
    sharding = batch_sharding(mesh) if divisible else replicated(mesh)
    return {name: device_put_global(array, sharding) for name, array in batch.items()}


def image_grid(images: Float[NDArray, "n h w c"], columns: int) -> Image.Image:
    """Images in [-1, 1] row by row, as one image."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    canvas = np.ones((rows * columns, h, w, c), np.float32)
    canvas[:n] = images
    joined = canvas.reshape(rows, columns, h, w, c).swapaxes(1, 2)
    pixels = np.round((joined.reshape(rows * h, columns * w, c).clip(-1, 1) + 1) * 127.5)
    return Image.fromarray(pixels.astype(np.uint8))
