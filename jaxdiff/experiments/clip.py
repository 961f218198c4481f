"""Training CLIP, whose text encoder conditions diffusion models."""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxdiff.checkpoints.components import Component, write_component
from jaxdiff.checkpoints.jsonfiles import write_object
from jaxdiff.checkpoints.pipelines import PREPROCESSOR
from jaxdiff.checkpoints.training_state import has_checkpoint
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, PyTree
from jaxdiff.data.tokenizer import load_tokenizer
from jaxdiff.data.trained_tokenizer import save_tokenizer, train_tokenizer
from jaxdiff.experiments.experiment import (
    CHECKPOINTS,
    FILES,
    Experiment,
    ModelSource,
    Samples,
    Wiring,
    image_shapes,
    shard_or_replicate,
    training_batches,
    training_captions,
    validation_batch,
    validation_captions,
)
from jaxdiff.experiments.procedural import image_side, procedural_dataset
from jaxdiff.models.build import abstract, with_params
from jaxdiff.models.clip import CLIPModel, CLIPTextModel
from jaxdiff.training.config import PROCEDURAL_KINDS, CLIPObjective, TrainConfig
from jaxdiff.training.objectives.clip import (
    AttributeHeads,
    attribute_loss,
    clip_task,
    mask_duplicate_captions,
    retrieval,
    run_towers,
    same_caption,
    split_heads,
)
from jaxdiff.training.step import HostParams, Metrics, Params

NUM_TOKENIZER_CAPTIONS = 20_000  # training set of the tokenizer


def workdir_tokenizer(config: TrainConfig, workdir: pathlib.Path) -> Any:
    """The tokenizer of the workdir, or one trained on captions if there is no checkpoint."""
    folder = workdir / "tokenizer"
    complete = (folder / "special_tokens_map.json").exists()  # the last file to be written
    if not (complete and has_checkpoint(workdir / CHECKPOINTS)):
        text = cast(CLIPObjective, config.objective).text
        captions = itertools.islice(training_captions(config), NUM_TOKENIZER_CAPTIONS)
        tokenizer = train_tokenizer(captions, text.vocab_size, text.max_position_embeddings)
        save_tokenizer(tokenizer, folder)
    return load_tokenizer(folder)


def with_vocabulary(objective: CLIPObjective, tokenizer: Any) -> CLIPObjective:
    """`objective` with the tokenizer's vocabulary in the text encoder's config."""
    text = dataclasses.replace(
        objective.text,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=objective.projection_dim,
    )
    return dataclasses.replace(objective, text=text)


def _check_side(config: TrainConfig) -> None:
    """InputError unless images have the size of the vision encoder."""
    data, side = config.data, cast(CLIPObjective, config.objective).vision.image_size
    given = image_side(data) if data.kind in PROCEDURAL_KINDS else data.resolution
    if given != side or data.max_aspect_ratio > 1:
        raise InputError(
            f"objective.vision.image_size: got {side} for images of {given} with sides up to "
            f"{data.max_aspect_ratio:g}, expected squares of one size for both"
        )


def attribute_heads(config: TrainConfig) -> AttributeHeads | None:
    """The attribute heads, if there are any; InputError for data without labels."""
    objective = cast(CLIPObjective, config.objective)
    if not objective.has_attribute_heads:
        return None
    if config.data.kind not in PROCEDURAL_KINDS:
        raise InputError(
            f"objective.attribute_weight: got {objective.attribute_weight} for data.kind "
            f"{config.data.kind}, expected 0: only {', '.join(PROCEDURAL_KINDS)} have attributes"
        )
    dataset = procedural_dataset(config.data.kind)
    return AttributeHeads(dataset.labels, dataset.label_slots)


def wire_clip(config: TrainConfig, dtype: Dtype, models: ModelSource) -> Wiring:
    """CLIP's training as shapes."""
    del models  # nothing is frozen
    objective, heads = cast(CLIPObjective, config.objective), attribute_heads(config)
    length = objective.text.max_position_embeddings

    def batch(n: int) -> dict[str, jax.ShapeDtypeStruct]:
        ids = {"ids": jax.ShapeDtypeStruct((n, length), jnp.int32)}
        if heads is None:
            return image_shapes(config, n) | ids
        labels = jax.ShapeDtypeStruct((n, heads.attributes.width), jnp.bool_)
        names = ("targets", "known", "text_targets", "text_known")
        return image_shapes(config, n) | ids | dict.fromkeys(names, labels)

    return Wiring(clip_task(objective, dtype, heads), {}, batch)


def clip_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Evaluation: retrieval accuracy on the validation split. No sample grids."""
    _check_side(config)
    if config.data.kind not in PROCEDURAL_KINDS:
        validation_captions(config, 1)  # something can be read, or the workdir is not touched
    tokenizer = workdir_tokenizer(config, workdir)
    objective = with_vocabulary(cast(CLIPObjective, config.objective), tokenizer)
    heads = attribute_heads(config)
    collate = None
    if heads is not None:
        dataset = procedural_dataset(config.data.kind)
        collate = functools.partial(dataset.collate_captions, tokenizer=tokenizer)
    batch = shard_or_replicate(validation_batch(config, tokenizer, transform=collate))
    sizes = (objective.text, objective.vision, objective.projection_dim)
    template = abstract(CLIPModel, *sizes, dtype=dtype)

    @jax.jit
    def evaluate(params: Params, batch: dict[str, Array]) -> Metrics:
        tower_params, head_params = split_heads(params)
        found = run_towers(with_params(template, tower_params), batch["image"], batch["ids"])
        scores = mask_duplicate_captions(found.similarity, same_caption(batch["ids"]))
        accuracy = retrieval(scores, config.data.variations)
        if heads is None:
            return accuracy
        return accuracy | attribute_loss(heads, head_params, *found[:3], batch).accuracy

    def sample(params: Params, frozen: PyTree) -> Samples:
        found = jax.device_get(evaluate(params, batch))
        return Samples({f"validation_{name}": float(value) for name, value in found.items()})

    def export(params: HostParams, folder: pathlib.Path) -> None:
        params, _ = split_heads(params)
        text = {name: leaf for name, leaf in params.items() if name.startswith("text_model.")}
        module = with_params(abstract(CLIPTextModel, objective.text), text)
        write_component(folder / "text_encoder", Component(module=module))
        write_component(folder / "clip", Component(module=with_params(template, params)))
        half = [0.5] * objective.vision.num_channels  # images are in [-1, 1]
        write_object(folder / "clip" / PREPROCESSOR, {"image_mean": half, "image_std": half})
        save_tokenizer(tokenizer, folder / "tokenizer")

    wiring = wire_clip(dataclasses.replace(config, objective=objective), dtype, FILES)
    stream = training_batches(config, tokenizer, transform=collate)
    return Experiment(wiring, lambda shardings: {}, stream, sample, export)
