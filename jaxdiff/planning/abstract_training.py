"""A training as shapes: what is learnt, what is frozen and a batch, without a file of weights."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.checkpoints.clip_vision import clip_folder, read_image_processor, vision_of
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.model_registry import MODEL_CLASSES
from jaxdiff.checkpoints.pipelines import SCHEDULER
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, PyTree, dtype_of
from jaxdiff.core.validate import one_of
from jaxdiff.data.latents import DESCRIPTION, LatentCacheInfo, read_description
from jaxdiff.diffusion.schedules import NoiseSchedule
from jaxdiff.experiments.clip import attribute_heads
from jaxdiff.experiments.experiment import check_kind
from jaxdiff.models.build import abstract, param_dict
from jaxdiff.models.clip import CLIPTextModel, CLIPVisionModel
from jaxdiff.models.conditioning import ENCODERS
from jaxdiff.models.presets import preset
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.scenes.rendering import CANVAS
from jaxdiff.training.config import (
    ClassifierObjective,
    CLIPObjective,
    DiffusionObjective,
    DistillationObjective,
    Full,
    LoRA,
    TrainConfig,
    VAEObjective,
)
from jaxdiff.training.objectives import Learner
from jaxdiff.training.objectives.classifier import classifier_learner
from jaxdiff.training.objectives.clip import clip_learner
from jaxdiff.training.objectives.diffusion import (
    IDS,
    Frozen,
    diffusion_learner,
    read_in_steps,
)
from jaxdiff.training.objectives.distillation import Frozen as DistillationFrozen
from jaxdiff.training.objectives.distillation import distillation_learner
from jaxdiff.training.objectives.perceptual import Eye
from jaxdiff.training.objectives.trainable import (
    Tuned,
    low_rank,
    new_word,
    unet_only,
    with_encoders,
)
from jaxdiff.training.objectives.vae import Frozen as VAEFrozen
from jaxdiff.training.objectives.vae import is_decoder, vae_learner

TEXT = ENCODERS[0]
# Folders of published repositories, and the presets that say what is in them.
PUBLISHED: dict[str, dict[str, tuple[str, str]]] = {
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
    """What a step of training is given, as shapes."""

    learner: Learner
    frozen: PyTree
    batch: Callable[[int], Batch]  # of so many pictures


def component(path: str, **options: Any) -> nnx.Module:
    """The module in the folder `path`, or in that folder of a published repository, as shapes."""
    folder = pathlib.Path(path)
    if (folder / "config.json").is_file():
        source = str(folder / "config.json")
        raw = read_object(folder / "config.json")
        name = str(raw.get("_class_name") or (raw.get("architectures") or [None])[0])
        kind = MODEL_CLASSES[one_of(f"{source}: class", name.removeprefix("Flax"), MODEL_CLASSES)]
        configs = kind.configs(raw, source=source)
        return abstract(kind.module, *configs, **kind.options, **options)
    repository, _, name = path.rpartition("/")
    if name not in PUBLISHED.get(repository, {}):
        known = ", ".join(PUBLISHED)
        raise InputError(
            f"plan: got {path} without a config.json, expected one, or a part of {known}"
        )
    return preset(*PUBLISHED[repository][name]).abstract(**options)


def abstract_training(config: TrainConfig) -> AbstractTraining:
    """The training of `config`; InputError for one that cannot be planned."""
    check_kind(config)
    makers: dict[type, Callable[[TrainConfig, Dtype], AbstractTraining]] = {
        VAEObjective: _vae,
        CLIPObjective: _clip,
        DiffusionObjective: _diffusion,
        DistillationObjective: _distillation,
        ClassifierObjective: _classifier,
    }
    return makers[type(config.objective)](config, dtype_of(config.dtype))


def _side(config: TrainConfig) -> int:
    """Of pictures, in pixels."""
    return config.data.resolution or CANVAS


def _pictures(config: TrainConfig, n: int) -> Batch:
    side = _side(config)
    return {"image": jax.ShapeDtypeStruct((n, side, side, 3), jnp.float32)}


def _ids(n: int, length: int) -> Batch:
    return {"ids": jax.ShapeDtypeStruct((n, length), jnp.int32)}


def _vae(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    objective = cast(VAEObjective, config.objective)
    table = param_dict(abstract(AutoencoderKL, objective.model))
    still = {k: v for k, v in table.items() if objective.freeze_encoder and not is_decoder(k)}
    eye = _eye(objective.perceptual_model, dtype)
    frozen = VAEFrozen(encoder=still, eye={} if eye is None else param_dict(eye.module))
    learner = vae_learner(objective, dtype, eye=eye)
    return AbstractTraining(learner, frozen, lambda n: _pictures(config, n))


def _eye(path: str | None, dtype: Dtype) -> Eye | None:
    """What compares pictures, in the folder at `path`."""
    if path is None:
        return None
    folder = clip_folder(pathlib.Path(path))
    module = vision_of(component(str(folder), **_all_in(dtype)), folder)
    # The tower of a whole CLIP model is made anew, and has to be told what it is stored in.
    config, projected = module.config, module.visual_projection is not None
    module = abstract(CLIPVisionModel, config, projected, **_all_in(dtype))
    return Eye(module, read_image_processor(folder, config.image_size))


def _all_in(dtype: Dtype) -> dict[str, Dtype]:
    """Weights and computation in `dtype`."""
    return {"dtype": dtype, "param_dtype": dtype}


def _clip(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    objective = cast(CLIPObjective, config.objective)
    length = objective.text.max_position_embeddings
    heads = attribute_heads(config)
    learner = clip_learner(objective, dtype, heads)

    def batch(n: int) -> Batch:
        labels = jax.ShapeDtypeStruct((n, heads.attributes.width if heads else 0), jnp.bool_)
        names = ("targets", "known", "text_targets", "text_known") if heads else ()
        return _pictures(config, n) | _ids(n, length) | dict.fromkeys(names, labels)

    return AbstractTraining(learner, {}, batch)


def _diffusion(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    objective = cast(DiffusionObjective, config.objective)
    if objective.prior_data is not None:
        raise InputError(
            "plan: got objective.prior_data, expected none: it changes nothing but data"
        )
    networks = _networks(objective, dtype)
    tuned = _tuned(objective, networks)
    latents, made = config.data.kind == "latents", _described(config)
    encoders = {name: cast(Any, networks[name]).config for name in ENCODERS if name in networks}
    lengths = {name: text.max_position_embeddings for name, text in encoders.items()}
    null = {n: jax.ShapeDtypeStruct((length,), jnp.int32) for n, length in lengths.items()}
    said = (
        {}
        if made is None
        else {n: _stored(made, size) for n, size in made.text_embedding_shapes.items()}
    )
    kept = read_in_steps(tuned, latents=latents, said=bool(said))
    tables = {n: param_dict(networks[n]) for n in kept}
    frozen = Frozen(
        weights=jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tables),
        null=said or cast(Any, null),
    )
    unet = cast(Any, networks["unet"]).config
    sized = unet.addition_embed_type is not None

    def batch(n: int) -> Batch:
        told = {name: jax.ShapeDtypeStruct((n, *x.shape), x.dtype) for name, x in said.items()}
        if not said:
            told = {IDS[name]: _ids(n, length)["ids"] for name, length in lengths.items()}
        if sized or config.data.kind != "scenes":
            told["time_ids"] = jax.ShapeDtypeStruct((n, 6), jnp.int32)
        if not latents:
            return _pictures(config, n) | told
        side = unet.sample_size
        sides = side if isinstance(side, tuple) else (side or 0,) * 2
        if made is not None:
            sides = (made.resolution // made.downscale,) * 2
        moments = jax.ShapeDtypeStruct((n, *sides, unet.in_channels), jnp.float32)
        return {"mean": moments, "logvar": moments} | told

    return AbstractTraining(diffusion_learner(objective, tuned, silent_null=sized), frozen, batch)


def _described(config: TrainConfig) -> LatentCacheInfo | None:
    """What says which latents are cached, where they are here already."""
    path = config.data.path if config.data.kind == "latents" else None
    if not path or not (pathlib.Path(path) / DESCRIPTION).is_file():
        return None
    return read_description(pathlib.Path(path))


def _stored(made: LatentCacheInfo, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """What is cached of one caption."""
    return jax.ShapeDtypeStruct(shape, dtype_of(made.dtype))


def _distillation(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    objective, both = cast(DistillationObjective, config.objective), _all_in(dtype)
    folder = objective.teacher
    teacher, vae, text = (component(f"{folder}/{name}", **both) for name in ("unet", "vae", TEXT))
    file = pathlib.Path(folder) / SCHEDULER / "scheduler_config.json"
    schedule = NoiseSchedule.from_config(read_object(file)) if file.is_file() else NoiseSchedule()
    networks = cast(UNet2DConditionModel, teacher), cast(AutoencoderKL, vae)
    learner = distillation_learner(objective, *networks, cast(CLIPTextModel, text), schedule)
    length = cast(CLIPTextModel, text).config.max_position_embeddings
    tables = param_dict(vae), param_dict(text), param_dict(teacher)
    null = jax.ShapeDtypeStruct((length,), jnp.int32)
    frozen = DistillationFrozen(*tables, cast(Any, null))
    return AbstractTraining(learner, frozen, lambda n: _pictures(config, n) | _ids(n, length))


def _classifier(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    objective = cast(ClassifierObjective, config.objective)
    vae = cast(AutoencoderKL, component(objective.vae, **_all_in(dtype)))
    width = objective.model.attributes.width

    def batch(n: int) -> Batch:
        asked = jax.ShapeDtypeStruct((n, width), jnp.bool_)
        return _pictures(config, n) | {"targets": asked, "known": asked}

    learner = classifier_learner(objective, vae, dtype)
    return AbstractTraining(learner, param_dict(vae), batch)


def _networks(objective: DiffusionObjective, dtype: Dtype) -> dict[str, nnx.Module]:
    """All networks as shapes, those that learn and those that do not."""
    compute = {"dtype": dtype, "remat": objective.remat}
    if objective.pipeline is None:
        vae, text = component(str(objective.vae)), component(f"{objective.text_encoder}/{TEXT}")
        unet = abstract(UNet2DConditionModel, objective.model, **compute)
        return {"unet": unet, "vae": _computing(vae, dtype), TEXT: _computing(text, dtype)}
    source = str(objective.pipeline)
    folder, known = pathlib.Path(source), PUBLISHED.get(source, {})
    names = [n for n in ("vae", *ENCODERS) if n in known or (folder / n).is_dir()]
    model = cast(Any, component(f"{source}/unet")).config
    networks = {name: _computing(component(f"{source}/{name}"), dtype) for name in names}
    return {"unet": abstract(UNet2DConditionModel, model, **compute), **networks}


def _computing(module: nnx.Module, dtype: Dtype) -> nnx.Module:
    """The same network computing in `dtype`."""
    if isinstance(module, CLIPTextModel):
        projected = module.text_projection is not None
        return abstract(CLIPTextModel, module.config, projected, dtype=dtype)
    return abstract(AutoencoderKL, cast(AutoencoderKL, module).config, dtype=dtype)


def _tuned(objective: DiffusionObjective, networks: dict[str, nnx.Module]) -> Tuned:
    """What of the networks is learnt."""
    train = objective.trainable
    if isinstance(train, LoRA):
        return low_rank(networks, train)
    if isinstance(train, Full):
        return with_encoders(networks, dict) if train.text_encoders else unet_only(networks)
    texts = {name: cast(Any, networks[name]).config for name in ENCODERS if name in networks}
    vectors = {
        n: np.zeros((train.num_vectors, c.hidden_size), np.float32) for n, c in texts.items()
    }
    return new_word(networks, vectors, {name: c.vocab_size for name, c in texts.items()})
