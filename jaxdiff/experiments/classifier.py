"""Training the classifier of noisy latents, on labelled data and a frozen VAE."""

import pathlib
from typing import cast

import jax
import jax.numpy as jnp

from jaxdiff.checkpoints.components import Component, write_component
from jaxdiff.checkpoints.jsonfiles import write_object
from jaxdiff.checkpoints.pipelines import CLASSIFIER
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.core.configs import to_mapping
from jaxdiff.core.errors import InputError, errors_of
from jaxdiff.core.types import Array, Dtype
from jaxdiff.experiments.experiment import (
    FILES,
    Experiment,
    ModelSource,
    Samples,
    Wiring,
    image_shapes,
    read_placed,
    shard_or_replicate,
    training_batches,
    validation_batch,
)
from jaxdiff.experiments.procedural import image_side, procedural_dataset
from jaxdiff.models.attributes import LabelSet
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.classifier import LatentClassifier
from jaxdiff.models.prompt_labels import PROMPT_LABELS
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.training.config import ClassifierObjective, TrainConfig
from jaxdiff.training.objectives.classifier import accuracies, classifier_task
from jaxdiff.training.step import HostParams, Params

EVAL_TIMESTEP_FRACTIONS = (
    0.0,
    0.25,
    0.5,
    0.75,
    0.95,
)  # timesteps of the evaluation


def _check(config: TrainConfig, vae: AutoencoderKL, labels: LabelSet) -> None:
    """InputError unless the classifier is for the latents and the labels of the data."""
    objective = cast(ClassifierObjective, config.objective)
    model, pixels = objective.model, image_side(config.data, vae.config.downscale)
    side, channels = pixels // vae.config.downscale, vae.config.latent_channels
    for name, wanted in (("sample_size", side), ("in_channels", channels)):
        if getattr(model, name) != wanted:
            raise InputError(
                f"objective.model.{name}: got {getattr(model, name)}, expected {wanted} as the "
                f"latents of {objective.vae} have"
            )
    if model.attributes != labels:
        raise InputError(
            f"objective.model.group_names: got {', '.join(model.group_names)}, expected the groups "
            f"of {config.data.kind}: {', '.join(group.name for group in labels.groups)}"
        )


def wire_classifier(config: TrainConfig, dtype: Dtype, models: ModelSource) -> Wiring:
    """The classifier's training as shapes."""
    objective = cast(ClassifierObjective, config.objective)
    vae = _abstract_vae(objective, dtype, models)
    width = objective.model.attributes.width

    def batch(n: int) -> dict[str, jax.ShapeDtypeStruct]:
        labels = jax.ShapeDtypeStruct((n, width), jnp.bool_)
        return image_shapes(config, n) | {"targets": labels, "known": labels}

    return Wiring(classifier_task(objective, vae, dtype), param_dict(vae), batch)


def _abstract_vae(
    objective: ClassifierObjective, dtype: Dtype, models: ModelSource
) -> AutoencoderKL:
    folder = pathlib.Path(objective.vae)
    with errors_of("objective.vae"):
        return cast(AutoencoderKL, models.component(folder, dtype=dtype, param_dtype=dtype))


def classifier_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Evaluation: accuracy on the validation split, by group and timestep. No sample grids."""
    objective = cast(ClassifierObjective, config.objective)
    folder, vae = pathlib.Path(objective.vae), _abstract_vae(objective, dtype, FILES)
    dataset = procedural_dataset(config.data.kind)
    _check(config, vae, dataset.labels)
    wiring = wire_classifier(config, dtype, FILES)
    template = abstract(LatentClassifier, objective.model, dtype=dtype)
    timesteps = [
        int(fraction * objective.schedule.num_discrete) for fraction in EVAL_TIMESTEP_FRACTIONS
    ]
    batch = shard_or_replicate(validation_batch(config, transform=dataset.collate_labels))

    @jax.jit
    def evaluate(params: Params, frozen: Params, batch: dict[str, Array]) -> tuple[Array, Array]:
        encoder = with_params(vae, frozen)
        x0 = encoder.scale(encoder.encode(batch["image"])[0])
        key = jax.random.key(0)
        model = with_params(template, params)
        accuracy = accuracies(
            model, objective.schedule, x0, batch["targets"], batch["known"], timesteps, key
        )
        return accuracy, wiring.task.loss(params, frozen, batch, key)[0]

    def sample(params: Params, frozen: Params) -> Samples:
        accuracy, loss = jax.device_get(evaluate(params, frozen, batch))
        fractions = {
            f"validation_{name}_{timestep}": float(fraction)
            for timestep, row in zip(timesteps, accuracy, strict=True)
            for name, fraction in zip(objective.model.group_names, row, strict=True)
        }
        return Samples({"validation_loss": float(loss)} | fractions)

    def export(params: HostParams, folder: pathlib.Path) -> None:
        module = with_params(abstract(LatentClassifier, objective.model), params)
        write_component(folder / CLASSIFIER, Component(module=module))
        write_object(folder / CLASSIFIER / PROMPT_LABELS, to_mapping(dataset.prompt_grammar))

    return Experiment(
        wiring,
        lambda shardings: read_placed(folder, shardings, dtype),
        training_batches(config, transform=dataset.collate_labels),
        sample,
        export,
        {"weights of vae": digest(find_weights(folder))},
    )
