"""Metrics of images that a diffusion training generates."""

import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.clip_vision import CLIP, clip_folder, read_vision
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, NDArray, UInt8
from jaxdiff.data.batches import normalize_images
from jaxdiff.evaluation.alignment import Judge, Prompt, accuracies, subsample
from jaxdiff.evaluation.frechet import Moments, frechet_distance, moments
from jaxdiff.experiments.experiment import (
    GRID_SIZE,
    shard_or_replicate,
    validation_captions,
)
from jaxdiff.experiments.procedural import ProceduralDataset, image_side, procedural_dataset
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.latent_codec import LatentCodec
from jaxdiff.parallel.distributed import gather_to_host
from jaxdiff.parallel.mesh import INFER, make_mesh
from jaxdiff.parallel.sharding import infer_sharding
from jaxdiff.training.config import PROCEDURAL_KINDS, DiffusionObjective, TrainConfig

DEFAULT_EVAL_IMAGES = 64  # if the config has None
# captions, and a way to real images of them, if they are needed -> inputs of the sampler
MakeSamplingInputs = Callable[[Sequence[str], Callable[[], NDArray]], Mapping[str, NDArray]]
# inputs -> images in [-1, 1]
Generate = Callable[[Mapping[str, Array]], Array]
# The sampler, and the weights of the latent codec on the devices -> metrics by name
Evaluation = Callable[[Generate, Mapping[str, Array]], Mapping[str, float]]
Embed = Callable[[Float[NDArray, "n h w 3"]], Float[NDArray, "n d"]]


def make_evaluation(
    config: TrainConfig,
    make_inputs: MakeSamplingInputs,
    codec: LatentCodec,
    validation: Mapping[str, NDArray],
) -> Evaluation:
    """Metrics of `objective.num_eval_images` generated images by name; none for 0 images.

    For procedural data: accuracies over standard prompts, none of which was trained on, by the
    data set's judge, and `fid` against renderings of all of these prompts. For other data
    with a CLIP: `fid` against the images of the `validation` batch, generated for their captions.

    `fid` is the `frechet_distance` of CLIP image embeddings. With few images it is too large, by
    about the same amount at each step: compare it within a training, or with trainings that have
    the same number of images and the same CLIP.
    """
    objective = cast(DiffusionObjective, config.objective)
    kind = config.data.kind
    dataset = procedural_dataset(kind) if kind in PROCEDURAL_KINDS else None
    count, folder = _num_images(config, dataset), _clip_model(objective, dataset)
    if not count or not (dataset or folder):
        return lambda generate, codec_weights: {}
    prompts: list[Prompt] = []
    if dataset is not None:
        spread = subsample(dataset.standard_prompts(), count)
        prompts = list(itertools.islice(itertools.cycle(spread), count))
    captions = [p.text for p in prompts] or validation_captions(config, count)
    inputs = make_inputs(captions, lambda: captioned_images(config, captions, validation))
    embed = None if folder is None else _clip_embedding(folder)

    reference: list[Moments] = []  # once images are generated

    def evaluate(generate: Generate, codec_weights: Mapping[str, Array]) -> Mapping[str, float]:
        images = in_batches(generate, inputs)
        metrics = {} if dataset is None else _judge_metrics(dataset, prompts, images)
        if embed is not None:
            if not reference:
                real = (
                    _decoded_images(codec, codec_weights, validation)
                    if dataset is None
                    else _renderings(dataset, image_side(config.data))
                )
                reference.append(moments(embed(real)))
            metrics["fid"] = frechet_distance(moments(embed(images)), reference[0])
        return metrics

    return evaluate


def _num_images(config: TrainConfig, dataset: ProceduralDataset | None) -> int:
    """How many images to generate; InputError if they would never be generated or evaluated."""
    objective = cast(DiffusionObjective, config.objective)
    wanted, measurable = (
        objective.num_eval_images,
        dataset is not None or _clip_model(objective, dataset) is not None,
    )
    if wanted and not measurable:
        raise InputError(
            f"objective.num_eval_images: got {wanted} for data without a metric, "
            f"expected a folder in objective.eval_clip or {CLIP}/ in {objective.text_encoder}"
        )
    if not config.sample_every:
        for name in ("num_eval_images", "eval_clip"):
            if getattr(objective, name):
                raise InputError(
                    f"objective.{name}: got {getattr(objective, name)}, expected it left out with "
                    "sample_every 0"
                )
        return 0
    return (DEFAULT_EVAL_IMAGES if wanted is None else wanted) if measurable else 0


def _clip_model(
    objective: DiffusionObjective, dataset: ProceduralDataset | None
) -> pathlib.Path | None:
    """The folder of the CLIP for FID: eval_clip, or that of the text encoder or of the data set."""
    if objective.eval_clip is not None:
        return clip_folder(pathlib.Path(objective.eval_clip))
    own = pathlib.Path(str(objective.text_encoder)) / CLIP
    if own.is_dir():
        return own
    return None if dataset is None else dataset.fid_clip


def _judge_metrics(
    judge: Judge, prompts: Sequence[Prompt], images: Float[NDArray, "n s s 3"]
) -> dict[str, float]:
    """Accuracies by name, and the fraction of images with everything correct."""
    scores = judge.score_images(prompts, to_bytes(images))
    found = accuracies(judge.answers(prompts, scores))
    values = {name: accuracy.value for name, accuracy in found.items()}
    values["all correct"] = float(np.mean([s.all_correct for s in scores]))
    return {re.sub(r"\W", "_", name): value for name, value in values.items()}


def captioned_images(
    config: TrainConfig, captions: Sequence[str], validation: Mapping[str, NDArray]
) -> Float[NDArray, "n s s 3"]:
    """Real images of standard prompts, or of the captions of the `validation` split in order."""
    if config.data.kind in PROCEDURAL_KINDS:
        return _renderings(procedural_dataset(config.data.kind), image_side(config.data), captions)
    return validation["image"][np.arange(len(captions)) % len(validation["image"])]


def _renderings(
    judge: Judge, side: int, texts: Sequence[str] | None = None
) -> Float[NDArray, "n s s 3"]:
    """Renderings of standard prompts, by default of all, `side` pixels wide."""
    prompts = judge.standard_prompts()
    texts = [p.text for p in prompts] if texts is None else list(texts)
    render = judge.render_generator(prompts, side)
    return normalize_images(render(texts, list(range(len(texts)))))


def _clip_embedding(folder: pathlib.Path) -> Embed:
    """CLIP image embeddings of images in [-1, 1], not normalised."""
    place = functools.partial(infer_sharding, mesh=make_mesh(data=1, fsdp=INFER))
    module, image_processor = read_vision(folder, dtype=jnp.float32, sharding=place)
    table = param_dict(module)

    @jax.jit
    def embed(params: Mapping[str, Array], images: Array) -> Array:
        return with_params(module, params)(image_processor(images.clip(-1, 1))).pooled

    return lambda images: in_batches(lambda part: embed(table, part["images"]), {"images": images})


def _decoded_images(
    codec: Any, weights: Mapping[str, Array], validation: Mapping[str, NDArray]
) -> Float[NDArray, "n h w 3"]:
    """The images of the validation batch; latents are decoded."""
    if "image" in validation:
        return validation["image"]
    decode = jax.jit(lambda params, z: with_params(codec, params).decode(z))
    return in_batches(lambda part: decode(weights, part["z"]), {"z": validation["mean"]})


def in_batches(function: Generate, arrays: Mapping[str, NDArray]) -> NDArray:
    """`function` of all rows, GRID_SIZE at a time, so that the sampler compiles once."""
    n = len(next(iter(arrays.values())))
    rows = np.arange(-(-n // GRID_SIZE) * GRID_SIZE) % n
    parts = []
    for start in range(0, len(rows), GRID_SIZE):
        indices = rows[start : start + GRID_SIZE]
        part = shard_or_replicate({name: array[indices] for name, array in arrays.items()})
        parts.append(gather_to_host(function(part)))
    return np.concatenate(parts)[:n]


def to_bytes(images: Float[NDArray, "n h w 3"]) -> UInt8[NDArray, "n h w 3"]:
    """Images in [-1, 1] as bytes; values beyond are clipped."""
    return np.round((images.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
