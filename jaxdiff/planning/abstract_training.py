"""A training as shapes: task, frozen weights and batch, without reading weights."""

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.checkpoints.clip_vision import clip_folder, read_image_processor, vision_of
from jaxdiff.checkpoints.components import CONFIG, abstract_component
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.pipelines import SCHEDULER, abstract_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, PyTree, dtype_of
from jaxdiff.data.latents import DESCRIPTION, LatentCacheInfo, read_description
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.experiments.clip import attribute_heads
from jaxdiff.experiments.experiment import check_data_kind
from jaxdiff.experiments.procedural import image_side
from jaxdiff.families.base import Family
from jaxdiff.families.registry import detect_family
from jaxdiff.models.build import abstract, param_dict
from jaxdiff.models.clip import CLIPTextModel, CLIPVisionModel
from jaxdiff.models.presets import preset
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.training.config import (
    PROCEDURAL_KINDS,
    ClassifierObjective,
    CLIPObjective,
    DiffusionObjective,
    DistillationObjective,
    Full,
    LoRA,
    TrainConfig,
    VAEObjective,
)
from jaxdiff.training.objectives import TrainingTask
from jaxdiff.training.objectives.classifier import classifier_task
from jaxdiff.training.objectives.clip import clip_task
from jaxdiff.training.objectives.diffusion import (
    Frozen,
    LatentDiffusion,
    diffusion_task,
    frozen_networks_used,
)
from jaxdiff.training.objectives.distillation import distillation_task, student_model
from jaxdiff.training.objectives.perceptual import PerceptualModel
from jaxdiff.training.objectives.trainable import (
    ParameterPartition,
    train_denoiser,
    train_denoiser_and_text_encoders,
    train_lora,
    train_textual_inversion,
)
from jaxdiff.training.objectives.vae import Frozen as VAEFrozen
from jaxdiff.training.objectives.vae import is_decoder, vae_task

PREDICTION_TYPE = "epsilon"  # of a teacher; it costs as much as any other
# Components of published repositories and their presets.
PRESET_REPOSITORIES: dict[str, dict[str, tuple[str, str]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        "unet": ("unet", "sd15"),
        "vae": ("vae", "sd"),
        "text_encoder": ("text", "clip-l"),
    },
    "stabilityai/stable-diffusion-2-1": {
        "unet": ("unet", "sd21"),
        "vae": ("vae", "sd"),
        "text_encoder": ("text", "openclip-h"),
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet": ("unet", "sdxl-base"),
        "vae": ("vae", "sdxl"),
        "text_encoder": ("text", "clip-l"),
        "text_encoder_2": ("text", "openclip-bigg"),
    },
}

Batch = dict[str, jax.ShapeDtypeStruct]


class AbstractTraining(NamedTuple):
    """The inputs of a training step as shapes."""

    task: TrainingTask
    frozen: PyTree
    batch: Callable[[int], Batch]  # of a batch size


def published_component(path: str, **options: Any) -> nnx.Module:
    """The module in the folder `path`, or in that of a published repository, as shapes."""
    folder = pathlib.Path(path)
    if (folder / CONFIG).is_file():
        return abstract_component(folder, **options)
    repository, _, name = path.rpartition("/")
    if name not in PRESET_REPOSITORIES.get(repository, {}):
        known = ", ".join(PRESET_REPOSITORIES)
        raise InputError(
            f"plan: got {path} without a config.json, expected one, or a part of {known}"
        )
    return preset(*PRESET_REPOSITORIES[repository][name]).abstract(**options)


def published_model(source: str, **options: Any) -> tuple[Family, dict[str, nnx.Module]]:
    """The family and the networks of a pipeline folder or of a published repository, as shapes."""
    if source in PRESET_REPOSITORIES:
        names = PRESET_REPOSITORIES[source]
        modules = {name: published_component(f"{source}/{name}", **options) for name in names}
        return detect_family("StableDiffusionPipeline", modules, source=source), modules
    class_name, modules, plain = abstract_pipeline(pathlib.Path(source), **options)
    return detect_family(class_name, modules, plain, source=source), modules


def abstract_training(config: TrainConfig) -> AbstractTraining:
    """The training of `config`; InputError for one that cannot be planned."""
    check_data_kind(config)
    makers: dict[type, Callable[[TrainConfig, Dtype], AbstractTraining]] = {
        VAEObjective: _vae,
        CLIPObjective: _clip,
        DiffusionObjective: _diffusion,
        DistillationObjective: _distillation,
        ClassifierObjective: _classifier,
    }
    return makers[type(config.objective)](config, dtype_of(config.dtype))


def _image_size(config: TrainConfig) -> int:
    """Side of the images in pixels."""
    data = config.data
    return image_side(data) if data.kind in PROCEDURAL_KINDS else data.resolution or 0


def _images(config: TrainConfig, n: int) -> Batch:
    side = _image_size(config)
    return {"image": jax.ShapeDtypeStruct((n, side, side, 3), jnp.float32)}


def _ids(n: int, length: int) -> Batch:
    return {"ids": jax.ShapeDtypeStruct((n, length), jnp.int32)}


def _vae(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    objective = cast(VAEObjective, config.objective)
    table = param_dict(abstract(AutoencoderKL, objective.model))
    encoder = {k: v for k, v in table.items() if objective.freeze_encoder and not is_decoder(k)}
    perceptual_model = _perceptual_model(objective.perceptual_model, dtype)
    frozen = VAEFrozen(
        encoder=encoder,
        perceptual={} if perceptual_model is None else param_dict(perceptual_model.module),
    )
    task = vae_task(objective, dtype, perceptual_model=perceptual_model)
    return AbstractTraining(task, frozen, lambda n: _images(config, n))


def _perceptual_model(path: str | None, dtype: Dtype) -> PerceptualModel | None:
    """The perceptual model in the folder `path`, as shapes."""
    if path is None:
        return None
    folder = clip_folder(pathlib.Path(path))
    module = vision_of(published_component(str(folder), **_dtypes(dtype)), folder)
    # The tower of a whole CLIP model has no dtypes of its own.
    config, projected = module.config, module.visual_projection is not None
    module = abstract(CLIPVisionModel, config, projected, **_dtypes(dtype))
    return PerceptualModel(module, read_image_processor(folder, config.image_size))


def _dtypes(dtype: Dtype) -> dict[str, Dtype]:
    """Options for weights and computation in `dtype`."""
    return {"dtype": dtype, "param_dtype": dtype}


def _clip(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    objective = cast(CLIPObjective, config.objective)
    length = objective.text.max_position_embeddings
    heads = attribute_heads(config)
    task = clip_task(objective, dtype, heads)

    def batch(n: int) -> Batch:
        labels = jax.ShapeDtypeStruct((n, heads.attributes.width if heads else 0), jnp.bool_)
        names = ("targets", "known", "text_targets", "text_known") if heads else ()
        return _images(config, n) | _ids(n, length) | dict.fromkeys(names, labels)

    return AbstractTraining(task, {}, batch)


def _diffusion(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    objective = cast(DiffusionObjective, config.objective)
    if objective.prior_data is not None:
        raise InputError(
            "plan: got objective.prior_data, expected none: it changes nothing but data"
        )
    family, networks = _networks(objective, dtype)
    partition = _partition(objective, family, networks)
    latents, info = config.data.kind == "latents", _cache_info(config)
    lengths = _text_lengths(family, networks)
    text_encodings = (
        {}
        if info is None
        else {n: _text_encoding(info, size) for n, size in info.text_embedding_shapes.items()}
    )
    used = frozen_networks_used(partition, latents=latents, text_encodings=bool(text_encodings))
    frozen = Frozen(
        weights=_frozen_weights(networks, used, dtype),
        null=text_encodings or cast(Any, _null(lengths)),
    )
    denoiser = cast(Any, networks[family.network]).config
    reads_sizes = any(extra.argument == "time_ids" for extra in family.extras)

    def batch(n: int) -> Batch:
        inputs = {
            name: jax.ShapeDtypeStruct((n, *x.shape), x.dtype) for name, x in text_encodings.items()
        }
        if not text_encodings:
            inputs = _token_ids(n, family, lengths)
        if reads_sizes or config.data.kind not in PROCEDURAL_KINDS:
            inputs |= _sizes(n)
        if not latents:
            return _images(config, n) | inputs
        side = denoiser.sample_size
        sides = side if isinstance(side, tuple) else (side or 0,) * 2
        if info is not None:
            sides = (info.resolution // info.downscale,) * 2
        moments = jax.ShapeDtypeStruct((n, *sides, denoiser.in_channels), jnp.float32)
        return {"mean": moments, "logvar": moments} | inputs

    return AbstractTraining(diffusion_task(objective, partition), frozen, batch)


def _cache_info(config: TrainConfig) -> LatentCacheInfo | None:
    """The description of the latent cache, if it exists already."""
    path = config.data.path if config.data.kind == "latents" else None
    if not path or not (pathlib.Path(path) / DESCRIPTION).is_file():
        return None
    return read_description(pathlib.Path(path))


def _text_encoding(info: LatentCacheInfo, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The cached encoding of one caption."""
    return jax.ShapeDtypeStruct(shape, dtype_of(info.dtype))


def _distillation(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    objective = cast(DistillationObjective, config.objective)
    folder = pathlib.Path(objective.teacher)
    family, networks = _networks(DiffusionObjective(pipeline=objective.teacher), dtype)
    file = folder / SCHEDULER / "scheduler_config.json"
    schedule = VPSchedule.from_config(read_object(file)) if file.is_file() else VPSchedule()
    teacher = LatentDiffusion(train_denoiser(family, networks), PREDICTION_TYPE)
    student = student_model(objective, family, networks, PREDICTION_TYPE)
    task = distillation_task(objective, teacher, student, schedule)
    lengths = _text_lengths(family, networks)
    frozen = Frozen(_frozen_weights(networks, networks, dtype), cast(Any, _null(lengths)))

    def batch(n: int) -> Batch:
        sizes = {} if config.data.kind in PROCEDURAL_KINDS else _sizes(n)
        return _images(config, n) | _token_ids(n, family, lengths) | sizes

    return AbstractTraining(task, frozen, batch)


def _text_lengths(family: Family, networks: Mapping[str, nnx.Module]) -> dict[str, int]:
    """How many tokens each text encoder reads."""
    encoders = {name: cast(Any, networks[name]).config for name in family.id_columns}
    return {name: text.max_position_embeddings for name, text in encoders.items()}


def _token_ids(n: int, family: Family, lengths: Mapping[str, int]) -> Batch:
    columns = family.id_columns
    return {columns[name]: _ids(n, length)["ids"] for name, length in lengths.items()}


def _null(lengths: Mapping[str, int]) -> Batch:
    """The token ids of the null caption."""
    return {name: jax.ShapeDtypeStruct((n,), jnp.int32) for name, n in lengths.items()}


def _sizes(n: int) -> Batch:
    return {"time_ids": jax.ShapeDtypeStruct((n, 6), jnp.int32)}


def _frozen_weights(
    networks: Mapping[str, nnx.Module], names: Iterable[str], dtype: Dtype
) -> dict[str, dict[str, Any]]:
    """The weights of some networks in `dtype`."""
    tables = {name: param_dict(networks[name]) for name in names}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tables)


def _classifier(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    objective = cast(ClassifierObjective, config.objective)
    vae = cast(AutoencoderKL, published_component(objective.vae, **_dtypes(dtype)))
    width = objective.model.attributes.width

    def batch(n: int) -> Batch:
        labels = jax.ShapeDtypeStruct((n, width), jnp.bool_)
        return _images(config, n) | {"targets": labels, "known": labels}

    task = classifier_task(objective, vae, dtype)
    return AbstractTraining(task, param_dict(vae), batch)


def _networks(objective: DiffusionObjective, dtype: Dtype) -> tuple[Family, dict[str, nnx.Module]]:
    """The family and all networks as shapes, which compute in `dtype`."""
    if objective.pipeline is None:
        modules = {
            "vae": published_component(str(objective.vae)),
            "text_encoder": published_component(f"{objective.text_encoder}/text_encoder"),
            "unet": abstract(UNet2DConditionModel, objective.model),
        }
        family = detect_family("StableDiffusionPipeline", modules, source="objective")
    else:
        family, modules = published_model(str(objective.pipeline))
    config = cast(Any, modules[family.network]).config
    network = abstract(family.network_class, config, dtype=dtype, remat=objective.remat)
    names = (family.latent_codec, *family.id_columns)
    return family, {
        family.network: network,
        **{name: _with_dtype(modules[name], dtype) for name in names},
    }


def _with_dtype(module: nnx.Module, dtype: Dtype) -> nnx.Module:
    """The same network with the compute dtype `dtype`."""
    if isinstance(module, CLIPTextModel):
        projected = module.text_projection is not None
        return abstract(CLIPTextModel, module.config, projected, dtype=dtype)
    return abstract(AutoencoderKL, cast(AutoencoderKL, module).config, dtype=dtype)


def _partition(
    objective: DiffusionObjective, family: Family, networks: dict[str, nnx.Module]
) -> ParameterPartition:
    """The partition into trained parameters and frozen weights."""
    train = objective.trainable
    if isinstance(train, LoRA):
        return train_lora(family, networks, train)
    if isinstance(train, Full):
        return (
            train_denoiser_and_text_encoders(family, networks, dict)
            if train.text_encoders
            else train_denoiser(family, networks)
        )
    texts = {name: cast(Any, networks[name]).config for name in family.id_columns}
    vectors = {
        n: np.zeros((train.num_vectors, c.hidden_size), np.float32) for n, c in texts.items()
    }
    first_ids = {name: config.vocab_size for name, config in texts.items()}
    return train_textual_inversion(family, networks, vectors, first_ids)
