"""A training as shapes: what is learnt, what is frozen and a batch, without a file of weights."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.kinds import KINDS
from jaxdiff.cli.training.experiment import check_kind
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, PyTree, dtype_of
from jaxdiff.core.validate import one_of
from jaxdiff.data.drawing import CANVAS
from jaxdiff.models.build import abstract, weights
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.presets import preset
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.training.config import CLIPObjective, DiffusionObjective, TrainConfig, VAEObjective
from jaxdiff.training.objectives import Learner
from jaxdiff.training.objectives.clip import clip_learner
from jaxdiff.training.objectives.diffusion import Frozen, diffusion_learner
from jaxdiff.training.objectives.vae import vae_learner

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


def component(path: str, dtype: Dtype) -> nnx.Module:
    """The module in the folder `path`, or in that folder of a published repository, as shapes."""
    folder = pathlib.Path(path)
    if (folder / "config.json").is_file():
        source = str(folder / "config.json")
        raw = read_object(folder / "config.json")
        name = str(raw.get("_class_name") or (raw.get("architectures") or [None])[0])
        kind = KINDS[one_of(f"{source}: class", name.removeprefix("Flax"), KINDS)]
        configs = kind.configs(raw, source=source)
        return abstract(kind.module, *configs, dtype=dtype, param_dtype=dtype, **kind.options)
    repository, _, name = path.rpartition("/")
    if name not in PUBLISHED.get(repository, {}):
        known = ", ".join(PUBLISHED)
        raise InputError(
            f"plan: got {path} without a config.json, expected one, or a part of {known}"
        )
    return preset(*PUBLISHED[repository][name]).abstract(dtype=dtype, param_dtype=dtype)


def abstract_training(config: TrainConfig) -> AbstractTraining:
    """The training of `config`; InputError for an objective that cannot be planned."""
    check_kind(config)
    makers: dict[type, Callable[[TrainConfig, Dtype], AbstractTraining]] = {
        VAEObjective: _vae,
        CLIPObjective: _clip,
        DiffusionObjective: _diffusion,
    }
    kind = type(config.objective)
    if kind not in makers:
        names = ", ".join(maker.__name__ for maker in makers)
        raise InputError(f"plan: got a {kind.__name__}, expected one of {names}")
    return makers[kind](config, dtype_of(config.dtype))


def _side(config: TrainConfig) -> int:
    """Of pictures, in pixels."""
    return config.data.resolution or CANVAS


def _pictures(config: TrainConfig, n: int) -> Batch:
    side = _side(config)
    return {"image": jax.ShapeDtypeStruct((n, side, side, 3), jnp.float32)}


def _ids(n: int, length: int) -> Batch:
    return {"ids": jax.ShapeDtypeStruct((n, length), jnp.int32)}


def _vae(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    learner = vae_learner(cast(VAEObjective, config.objective), dtype)
    return AbstractTraining(learner, {}, lambda n: _pictures(config, n))


def _clip(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    objective = cast(CLIPObjective, config.objective)
    length = objective.text.max_position_embeddings
    learner = clip_learner(objective, dtype)
    return AbstractTraining(learner, {}, lambda n: _pictures(config, n) | _ids(n, length))


def _diffusion(config: TrainConfig, dtype: Dtype) -> AbstractTraining:
    objective = cast(DiffusionObjective, config.objective)
    vae = cast(AutoencoderKL, component(objective.vae, dtype))
    text = cast(CLIPTextModel, component(f"{objective.text_encoder}/text_encoder", dtype))
    length = text.config.max_position_embeddings
    null = jax.ShapeDtypeStruct((length,), jnp.int32)
    cached = config.data.kind == "latents"
    frozen = Frozen(vae=weights(vae), text_encoder=weights(text), null=cast(Any, null))

    def batch(n: int) -> Batch:
        if not cached:
            return _pictures(config, n) | _ids(n, length)
        side = objective.model.sample_size
        sides = side if isinstance(side, tuple) else (side or 0,) * 2
        moments = jax.ShapeDtypeStruct((n, *sides, objective.model.in_channels), jnp.float32)
        return {"mean": moments, "logvar": moments} | _ids(n, length)

    return AbstractTraining(diffusion_learner(objective, vae, text, dtype), frozen, batch)
