"""The model that a diffusion training starts from: a pipeline, or a VAE and a text encoder."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import numpy as np

from jaxdiff.checkpoints.components import Component, read_component
from jaxdiff.checkpoints.loading import host_memory
from jaxdiff.checkpoints.models import read_model, resolve_source, weight_hashes
from jaxdiff.checkpoints.pipelines import PipelineComponents
from jaxdiff.checkpoints.tokenizers import read_tokenizer
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import cast_floating as in_dtype
from jaxdiff.core.types import Dtype, Int, NDArray
from jaxdiff.data.texts import CaptionTokenizer
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.families.base import Family
from jaxdiff.families.registry import detect_family, family_of
from jaxdiff.models.build import abstract, param_dict
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.pipeline.vocabulary import tokenizer_of
from jaxdiff.training.config import DiffusionObjective, Full

SAMPLER, SPACING = "ddim", "trailing"  # of sample grids, and the defaults of what is exported


class BaseModel(NamedTuple):
    """A model before its training. Weights are on the host, in their stored dtypes.

    There is no UNet if it is initialised at random.
    """

    objective: DiffusionObjective  # with the fields that a pipeline provides
    family: Family
    pipeline: PipelineComponents
    reload: Callable[[], PipelineComponents]  # reads it again
    digests: Mapping[str, str]  # of the weights of each component

    @property
    def vae(self) -> AutoencoderKL:
        """The VAE."""
        return cast(AutoencoderKL, self.pipeline.components[self.family.latent_codec].module)

    @property
    def text_encoders(self) -> dict[str, CLIPTextModel]:
        """The text encoders, by name."""
        names, components = self.family.id_columns, self.pipeline.components
        return {name: cast(CLIPTextModel, components[name].module) for name in names}

    def abstract_networks(self, dtype: Dtype) -> dict[str, Any]:
        """All networks as shapes, with the compute dtype `dtype`."""
        objective, family = self.objective, self.family
        options: dict[str, Any] = {"dtype": dtype, "remat": objective.remat}
        denoiser = abstract(family.network_class, objective.model, **options)
        vae = abstract(AutoencoderKL, self.vae.config, dtype=dtype)
        texts = {
            name: abstract(
                CLIPTextModel, each.config, each.text_projection is not None, dtype=dtype
            )
            for name, each in self.text_encoders.items()
        }
        return {family.network: denoiser, family.latent_codec: vae, **texts}

    def host_weights(self, name: str, dtype: Dtype | None = None) -> dict[str, Any]:
        """The weights of a component on the host; `dtype` None keeps theirs."""
        table = param_dict(self.pipeline.components[name].module)
        table = table if dtype is None else in_dtype(table, dtype)
        return {path: np.asarray(array) for path, array in table.items()}

    def caption_tokenizer(self, caption: str | None = None) -> CaptionTokenizer:
        """The tokenizers of all text encoders."""
        files, columns = self.pipeline.tokenizers, self.family.id_columns
        tokenizers = {
            columns[spec.component]: tokenizer_of(files[spec.tokenizer])
            for spec in self.family.text_encoders
        }
        return CaptionTokenizer(tokenizers=tokenizers, caption=caption)

    def null_ids(self, tokenizer: CaptionTokenizer) -> dict[str, Int[NDArray, "_"]]:
        """The token ids of the null caption for each text encoder."""
        ids = tokenizer([""])
        return {name: ids[column][0] for name, column in self.family.id_columns.items()}


def load_base_model(
    objective: DiffusionObjective, *, resumed: bool = False, field: str = "objective.pipeline"
) -> BaseModel:
    """The model that `objective` names; InputError for one that cannot be trained.

    If training is `resumed`, a UNet whose weights are all trained is not read again. `field` is
    the config's that names the pipeline.
    """
    if objective.pipeline is None:
        base = _from_components(objective, resumed and isinstance(objective.trainable, Full))
    else:
        base = _from_pipeline(objective)
    _check(base, field)
    return base


def _from_pipeline(objective: DiffusionObjective) -> BaseModel:
    source = str(objective.pipeline)
    path = resolve_source(source)

    def reload() -> PipelineComponents:
        return read_model(path, sharding=host_memory())

    pipeline = reload()
    family = family_of(pipeline, source)
    network: Any = pipeline.components[family.network].module
    provided = dict.fromkeys(("vae", "text_encoder", "weights"), source) | {
        "model": network.config,
        "schedule": VPSchedule.from_config(pipeline.scheduler),
        "prediction_type": pipeline.scheduler.get("prediction_type", "epsilon"),
    }
    filled = dataclasses.replace(objective, pipeline=None, **cast(Any, provided))
    names = (family.network, family.latent_codec, *family.id_columns)
    return BaseModel(filled, family, pipeline, reload, weight_hashes(path, names))


def _from_components(objective: DiffusionObjective, skip_unet: bool) -> BaseModel:
    text_folder = pathlib.Path(str(objective.text_encoder))
    folders = {
        "vae": pathlib.Path(str(objective.vae)),
        "text_encoder": text_folder / "text_encoder",
    }
    if objective.weights is not None and not skip_unet:
        folders["unet"] = pathlib.Path(objective.weights)

    def reload() -> PipelineComponents:
        sharding = host_memory()
        components = {n: read_component(f, sharding=sharding) for n, f in folders.items()}
        if "unet" in components:  # its config is the objective's, also where it is not read again
            components["unet"] = Component(module=components["unet"].module)
        return PipelineComponents(
            components=components,
            scheduler=scheduler_config(objective),
            tokenizers={"tokenizer": read_tokenizer(text_folder / "tokenizer")},
            defaults={
                "guidance_scale": objective.sample_guidance_scale,
                "steps": objective.sample_steps,
                "sampler": SAMPLER,
            },
        )

    pipeline = reload()
    if "unet" in folders:
        _check_weights(objective, pipeline.components["unet"])
    digests = {name: digest(find_weights(folder)) for name, folder in folders.items()}
    modules = {name: component.module for name, component in pipeline.components.items()}
    modules["unet"] = abstract(UNet2DConditionModel, objective.model)
    family = detect_family(pipeline.class_name, modules, source="objective")
    return BaseModel(objective, family, pipeline, reload, digests)


def scheduler_config(objective: DiffusionObjective) -> dict[str, Any]:
    """The scheduler_config.json with which a pipeline samples as the sample grids do."""
    return objective.schedule.to_config() | {
        "_class_name": "DDIMScheduler",
        "prediction_type": objective.prediction_type,
        "timestep_spacing": SPACING,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "steps_offset": 1,  # diffusers insists on it; trailing steps do not read it
    }


def _check_weights(objective: DiffusionObjective, unet: Component) -> None:
    """InputError unless the UNet's weights fit objective.model."""
    shapes = param_dict(abstract(UNet2DConditionModel, objective.model))
    stored = param_dict(unet.module)
    for path in sorted(stored.keys() | shapes):
        got, wanted = (table[path].shape if path in table else None for table in (stored, shapes))
        if got != wanted:
            raise InputError(
                f"objective.weights: got {objective.weights} with {path} {got}, "
                f"expected {wanted} as objective.model has"
            )


def _check(base: BaseModel, field: str) -> None:
    """InputError for networks that do not fit together, or need inputs that no data have."""
    objective, encoders = base.objective, base.text_encoders
    for extra in base.family.extras:
        if extra.untrainable is not None:
            raise InputError(f"{field}: {extra.untrainable}")
    rates = objective.caption_dropout_per_encoder
    if rates and (len(encoders) == 1 or len(rates) != len(encoders)):
        wanted = len(encoders) if len(encoders) > 1 else "none for one text encoder"
        raise InputError(
            f"objective.caption_dropout_per_encoder: got {len(rates)} rates, expected {wanted}"
        )
