"""The model that a diffusion training starts from: a pipeline, or a VAE and a text encoder."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.components import Component, read_component
from jaxdiff.checkpoints.loading import Placement, host_memory
from jaxdiff.checkpoints.model_registry import class_of_config, rebuilt
from jaxdiff.checkpoints.models import read_model, resolve_source, weight_hashes
from jaxdiff.checkpoints.pipelines import PipelineComponents
from jaxdiff.checkpoints.schedulers import (
    clipping_of,
    flow_schedule_config,
    unclip_scheduler_config,
    vp_schedule_config,
)
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.core.errors import InputError, errors_of
from jaxdiff.core.types import Dtype, Int, NDArray
from jaxdiff.data.texts import CaptionTokenizer
from jaxdiff.diffusion.schedules import FlowSchedule, VPSchedule
from jaxdiff.experiments.experiment import FILES, ModelSource, shapes_in
from jaxdiff.experiments.image_encoder import ImageEncoder, image_encoder_of
from jaxdiff.families.base import Family
from jaxdiff.families.detection import detect_family
from jaxdiff.families.image_embeddings import ImageEmbedding
from jaxdiff.families.low_resolution import NOISING_SCHEDULER
from jaxdiff.families.registry import FROM_SCRATCH
from jaxdiff.models.build import abstract, param_dict
from jaxdiff.models.image_processor import CLIPImageProcessor
from jaxdiff.models.latent_codec import LatentCodec
from jaxdiff.models.text_encoder import TextModel
from jaxdiff.parallel.mesh import device_put_global
from jaxdiff.pipeline.tokenizers import tokenizer_of
from jaxdiff.training.config import DiffusionObjective, Full, TrainConfig
from jaxdiff.training.config.objectives import ENLARGEMENT, PIXELS, VLB_WEIGHT, components_of
from jaxdiff.training.objectives.diffusion import Frozen, trains_variance

SAMPLER, SPACING = "ddim", "trailing"  # of sample grids, and the defaults of what is exported


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A model before its training: its networks as shapes, and how to read their weights."""

    objective: DiffusionObjective  # with the fields that a pipeline provides
    family: Family
    pipeline: PipelineComponents  # its modules have shapes
    read: Callable[..., PipelineComponents]  # the same with weights; options as `read_pipeline`
    hash_weights: Callable[[], Mapping[str, str]]  # of each component
    image_encoder: ImageEncoder | None = None  # of networks with embeddings of images

    @functools.cached_property
    def digests(self) -> Mapping[str, str]:
        """Of the weights of each component that is read."""
        found = dict(self.hash_weights())
        if self.image_encoder is not None and self.image_encoder.folder is not None:
            found[str(self.family.image_encoder)] = self.image_encoder.digest()
        return found

    @property
    def networks(self) -> dict[str, Any]:
        """The networks of the family, by component, as shapes."""
        found = {name: self.pipeline.components[name].module for name in _components(self.family)}
        if self.image_encoder is not None:
            found[str(self.family.image_encoder)] = self.image_encoder.module
        return found

    @property
    def codec(self) -> LatentCodec:
        """The latent codec, or that of pixels."""
        return self.family.codec(self.networks)

    @property
    def clipping(self) -> str | None:
        """The guidance wrapper that clips the image of each step, where the scheduler does."""
        return clipping_of(self.pipeline.scheduler, pixels=self.family.latent_codec is None)

    @property
    def begins_at_random(self) -> bool:
        """Whether the network's initial weights are random."""
        train = self.objective.trainable
        return isinstance(train, Full) and (self.objective.weights is None or train.from_scratch)

    @property
    def image_processor(self) -> CLIPImageProcessor | None:
        """Of the image encoder."""
        return None if self.image_encoder is None else self.image_encoder.processor

    @property
    def text_encoders(self) -> dict[str, TextModel]:
        """The text encoders, by name."""
        networks = self.networks
        return {spec.component: networks[spec.component] for spec in self.family.text_encoders}

    def abstract_networks(self, dtype: Dtype) -> dict[str, Any]:
        """The networks with the compute dtype `dtype`."""
        networks, own = self.networks, self.family.network
        options: dict[str, Any] = {"dtype": dtype, "remat": self.objective.remat}
        denoiser = abstract(self.family.network_class, self.objective.model, **options)
        others = {n: rebuilt(each, dtype=dtype) for n, each in networks.items() if n != own}
        return {own: denoiser, **others}

    def read_weights(
        self, name: str, dtype: Dtype | None = None, sharding: Placement = None
    ) -> dict[str, Any]:
        """The weights of a component; `dtype` None keeps theirs."""
        encoder = self.image_encoder
        if name == self.family.image_encoder and encoder is not None and encoder.folder is not None:
            return param_dict(encoder.read(dtype, sharding))
        parts = self.read(only=(name,), dtype=dtype, sharding=sharding)
        return param_dict(parts.components[name].module)

    def host_weights(self, name: str, dtype: Dtype | None = None) -> dict[str, Any]:
        """The weights of a component on the host; `dtype` None keeps theirs."""
        table = self.read_weights(name, dtype, host_memory())
        return {path: np.asarray(array) for path, array in table.items()}

    def caption_tokenizer(self, caption: str | None = None) -> CaptionTokenizer:
        """The tokenizers of all text encoders."""
        files, columns = self.pipeline.tokenizers, self.family.id_columns
        tokenizers = {
            columns[spec.component]: tokenizer_of(
                files[spec.tokenizer], spec.length, lowercases=spec.lowercases
            )
            for spec in self.family.text_encoders
        }
        columns = self.family.caption_columns
        return CaptionTokenizer(tokenizers=tokenizers, columns=columns, caption=caption)

    def null_ids(self, tokenizer: CaptionTokenizer) -> dict[str, Int[NDArray, "_"]]:
        """The token ids of the null caption for each text encoder."""
        ids = tokenizer([""])
        return {name: ids[column][0] for name, column in self.family.id_columns.items()}


def load_base_model(
    objective: DiffusionObjective,
    models: ModelSource = FILES,
    *,
    field: str = "objective.pipeline",
) -> BaseModel:
    """The model that `objective` names; InputError for one that cannot be trained.

    `field` is the config's that names the pipeline.
    """
    make = _from_components if objective.pipeline is None else _from_pipeline
    base = make(objective, models)
    encoder = image_encoder_of(base.pipeline, base.family, objective.image_encoder, models)
    base = dataclasses.replace(base, image_encoder=encoder)
    _check(base, field)
    return base


def _components(family: Family) -> tuple[str, ...]:
    """The networks of a family: the one that denoises, the latent codec, the text encoders."""
    codec = () if family.latent_codec is None else (family.latent_codec,)
    return family.network, *codec, *(spec.component for spec in family.text_encoders)


def _from_pipeline(objective: DiffusionObjective, models: ModelSource) -> BaseModel:
    source = str(objective.pipeline)
    pipeline = models.pipeline(source)
    modules = {name: component.module for name, component in pipeline.components.items()}
    family = detect_family(pipeline.class_name, modules, pipeline.family_options, source=source)
    schedule = family.schedule(pipeline.scheduler)
    if not isinstance(schedule, VPSchedule | FlowSchedule):
        raise InputError(
            f"objective.pipeline: got {source} with a {type(schedule).__name__}, expected a "
            "VPSchedule or a FlowSchedule"
        )
    model = cast(Any, modules[family.network]).config
    folders = dict.fromkeys(("weights", *components_of(model)), source)
    if "image_encoder" in folders:
        folders["image_encoder"] = objective.image_encoder or source
    provided = {
        "image_encoder": None,
        **folders,
        "model": model,
        "schedule": schedule,
        "prediction_type": family.prediction_type(pipeline.scheduler),
    }
    path = functools.cache(lambda: resolve_source(source))
    encoder = {str(family.image_encoder)} & pipeline.components.keys()
    return BaseModel(
        objective=dataclasses.replace(objective, pipeline=None, **cast(Any, provided)),
        family=family,
        pipeline=pipeline,
        read=lambda **options: read_model(path(), **options),
        hash_weights=lambda: weight_hashes(path(), (*_components(family), *encoder)),
    )


def _from_components(objective: DiffusionObjective, models: ModelSource) -> BaseModel:
    network_class = class_of_config(objective.model).module
    key = network_class, objective.vae in (PIXELS, None), objective.image_encoder is not None
    if key not in FROM_SCRATCH:
        raise InputError(
            f"objective.vae: got {PIXELS} for a {network_class.__name__}, expected the folder of a "
            "VAE"
        )
    class_name, family = FROM_SCRATCH[key]
    network, codec = family.network, family.latent_codec
    text_folder = pathlib.Path(str(objective.text_encoder))
    folders = {} if codec is None else {codec: pathlib.Path(str(objective.vae))}
    with errors_of("objective.vae"):
        modules = {name: models.component(folder) for name, folder in folders.items()}
    texts = {spec.component: text_folder / spec.component for spec in family.text_encoders}
    with errors_of("objective.text_encoder"):
        modules |= {name: models.component(folder) for name, folder in texts.items()}
        tokenizers = models.tokenizers(text_folder) if texts else {}
    folders |= texts
    if codec is not None:
        check_channels(objective, cast(Any, modules[codec]))
    # Its config is the objective's, also where its weights are read.
    modules[network] = abstract(network_class, objective.model)
    if objective.weights is not None:
        folders[network] = pathlib.Path(objective.weights)

    def read(
        only: Container[str] | None = None,
        dtype: Dtype | None = None,
        sharding: Placement = None,
    ) -> PipelineComponents:
        components = {name: Component(module=module) for name, module in modules.items()}
        for name, folder in folders.items():
            if only is None or name in only:
                found = read_component(folder, dtype=dtype, sharding=sharding)
                components[name] = Component(module=found.module) if name == network else found
        return dataclasses.replace(pipeline, components=components)

    def hash_weights() -> dict[str, str]:
        trained = (
            network if isinstance(objective.trainable, Full) else None
        )  # replaces what was read
        others = {name: folder for name, folder in folders.items() if name != trained}
        return {name: digest(find_weights(folder)) for name, folder in others.items()}

    names = {str(i): name for i, name in enumerate(objective.class_names)}
    options = {"id2label": names} if names else {}
    scheduler = scheduler_config(objective, family)
    pipeline = PipelineComponents(
        components={name: Component(module=module) for name, module in modules.items()},
        scheduler=scheduler,
        # of the noise of images to enlarge, if they are
        noising_schedulers={NOISING_SCHEDULER: scheduler} if objective.vae == PIXELS else {},
        tokenizers=tokenizers,
        class_name=class_name,
        options=options,
        defaults={
            "guidance_scale": objective.sample_guidance_scale,
            "steps": objective.sample_steps,
            "sampler": SAMPLER,
        },
    )
    return BaseModel(
        objective=objective,
        family=detect_family(class_name, modules, pipeline.family_options, source="objective"),
        pipeline=pipeline,
        read=read,
        hash_weights=hash_weights,
    )


def frozen_shapes(base: BaseModel, names: Iterable[str], dtype: Dtype) -> Frozen:
    """The weights of some networks in `dtype` and the token ids of the null caption, as shapes."""
    networks = base.networks
    weights = {name: shapes_in(param_dict(networks[name]), dtype) for name in names}
    null = {
        spec.component: jax.ShapeDtypeStruct(
            (spec.num_tokens(base.text_encoders[spec.component]),), jnp.int32
        )
        for spec in base.family.text_encoders
    }
    return Frozen(weights, null)


def place_frozen(
    base: BaseModel, dtype: Dtype, shardings: Frozen, null: Mapping[str, Any]
) -> Frozen:
    """The weights of `frozen_shapes`, read once to where they stay, and the null caption."""
    weights = {
        name: base.read_weights(name, dtype, lambda path, _, table=table: table[path])
        for name, table in shardings.weights.items()
    }
    placed = {name: device_put_global(null[name], place) for name, place in shardings.null.items()}
    return Frozen(weights, placed)


def caption_shapes(base: BaseModel, n: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch has of n captions: token ids, and the columns of extras."""
    columns = {k: (x.shape[1:], x.dtype) for k, x in base.family.caption_columns([""]).items()}
    for spec in base.family.text_encoders:
        length = spec.num_tokens(base.text_encoders[spec.component])
        columns[base.family.id_columns[spec.component]] = (length,), jnp.int32
    return {k: jax.ShapeDtypeStruct((n, *shape), dtype) for k, (shape, dtype) in columns.items()}


def size_shapes(n: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The sizes and crops of n images."""
    return {"time_ids": jax.ShapeDtypeStruct((n, 6), jnp.int32)}


def scheduler_config(objective: DiffusionObjective, family: Family) -> dict[str, Any]:
    """The scheduler_config.json with which a pipeline samples as the sample grids do.

    That of a prior is UnCLIPScheduler's, as diffusers asks for; InputError if it has no such one.
    """
    schedule, predicted = objective.schedule, {"prediction_type": objective.prediction_type}
    if family.embeddings is not None:
        return unclip_scheduler_config(schedule, objective.prediction_type)
    if isinstance(schedule, FlowSchedule):
        return flow_schedule_config(schedule) | predicted
    return vp_schedule_config(schedule) | {
        **predicted,
        "_class_name": "DDIMScheduler",
        "timestep_spacing": SPACING,
        "set_alpha_to_one": True,
        "clip_sample": family.latent_codec is None,
        "steps_offset": 1,  # diffusers insists on it; trailing steps do not read it
    }


def check_initial_weights(config: TrainConfig, *, resumed: bool) -> None:
    """InputError unless the network in objective.weights fits objective.model.

    If training is `resumed` and trains them all, they need not be there any more.
    """
    objective = cast(DiffusionObjective, config.objective)
    replaced = resumed and isinstance(objective.trainable, Full)
    if objective.weights is None or replaced:
        return
    shapes = param_dict(abstract(class_of_config(objective.model).module, objective.model))
    with errors_of("objective.weights"):
        stored = param_dict(FILES.component(pathlib.Path(str(objective.weights))))
    for path in sorted(stored.keys() | shapes):
        got, wanted = (table[path].shape if path in table else None for table in (stored, shapes))
        if got != wanted:
            raise InputError(
                f"objective.weights: got {objective.weights} with {path} {got}, "
                f"expected {wanted} as objective.model has"
            )


def check_channels(objective: DiffusionObjective, codec: LatentCodec, more: int = 0) -> None:
    """InputError unless the network takes and predicts as many channels as the codec has.

    It takes so many `more`, of an image that it enlarges.
    """
    channels, names = codec.config.latent_channels, ("in_channels", "out_channels")
    pairs = zip((channels + more, channels), objective.model.channels, strict=True)
    for name, (wanted, got) in zip(names, pairs, strict=True):
        if got != wanted:
            raise InputError(
                f"objective.model.{name}: got {got}, expected "
                f"{wanted} as the latents of {objective.vae} have"
            )


def _check_embeddings(base: BaseModel) -> None:
    """InputError unless the image encoder's embeddings have the width that the network has."""
    if base.image_encoder is None:
        return
    widths = [extra.width for extra in base.family.extras if isinstance(extra, ImageEmbedding)]
    wanted = widths[0] if widths else base.codec.config.latent_channels
    got = base.image_encoder.module.config.projection_dim
    if got != wanted:
        raise InputError(
            f"objective.image_encoder: got embeddings of width {got}, expected {wanted}, as the "
            "network has"
        )


def _check(base: BaseModel, field: str) -> None:
    """InputError for networks that do not fit together, or need inputs that no data have."""
    objective, encoders = base.objective, base.text_encoders
    for extra in base.family.extras:
        if extra.untrainable is not None:
            raise InputError(f"{field}: {extra.untrainable}")
    check_channels(objective, base.codec, 3 if base.family.enlarges else 0)
    _check_embeddings(base)
    enlarges_pixels = base.family.enlarges and base.family.latent_codec is None
    if objective.enlargement != ENLARGEMENT and not enlarges_pixels:
        raise InputError(
            f"objective.enlargement: got {objective.enlargement} for {base.family.name}, expected "
            "it left out: its network enlarges no images of pixels"
        )
    scale = objective.distilled_guidance_scale
    if scale != 1 and "distilled_guidance_scale" not in base.family.options:
        raise InputError(
            f"objective.distilled_guidance_scale: got {scale} for {base.family.name}, expected it "
            "left out: its network takes no guidance scale"
        )
    network = base.family.adapter(base.networks[base.family.network], objective.prediction_type)
    if objective.vlb_weight not in (0, VLB_WEIGHT) and not trains_variance(objective, network):
        raise InputError(
            f"objective.vlb_weight: got {objective.vlb_weight}, expected it left out: the network "
            "learns no variance"
        )
    rates = objective.caption_dropout_per_encoder
    if rates and (len(encoders) < 2 or len(rates) != len(encoders)):
        wanted = len(encoders) if len(encoders) > 1 else "none for one text encoder"
        raise InputError(
            f"objective.caption_dropout_per_encoder: got {len(rates)} rates, expected {wanted}"
        )
