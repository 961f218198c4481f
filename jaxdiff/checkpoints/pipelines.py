"""Pipeline folders of diffusers: model_index.json, a folder per component, and back.

model_index.json names the class of every component as `[library, class]`; the class of one that is
absent is null. Plain values are options of the pipeline. What it does not name is not read. An
optional jaxdiff.json holds the defaults of this model for jaxdiff (guidance scale, steps, ...).
"""

import pathlib
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from jaxdiff.checkpoints.components import (
    CONFIG,
    Component,
    abstract_component,
    read_component,
    shape_options,
    write_files,
)
from jaxdiff.checkpoints.flax_layout import flax_index
from jaxdiff.checkpoints.folder_stages import (
    FOLDER_STAGES,
    SCHEDULER,
    FolderStage,
    has_scheduler,
    stage_schedulers,
)
from jaxdiff.checkpoints.jsonfiles import read_object, write_object
from jaxdiff.checkpoints.loading import Placement
from jaxdiff.checkpoints.model_registry import MODEL_CLASSES, class_name_of, present_name
from jaxdiff.checkpoints.single_file_layouts import ANOTHER_VAE
from jaxdiff.checkpoints.tokenizers import TokenizerFiles, read_tokenizer, write_tokenizer
from jaxdiff.checkpoints.weights import variants
from jaxdiff.core.aliases import rename_settings
from jaxdiff.core.atomic import atomic_folder
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype
from jaxdiff.core.validate import one_of

INDEX = "model_index.json"
DEFAULTS = "jaxdiff.json"
SCHEDULER_CONFIG = "scheduler_config.json"
VAE_COMPONENT = "vae"
# Where it has another name, by pipeline class.
VAE_COMPONENTS = {
    "LDMTextToImagePipeline": "vqvae",
    "LDMClassConditionalPipeline": "vqvae",
    **{
        f"Kandinsky{task}Pipeline": "movq"
        for task in (
            *("", "Img2Img", "Inpaint"),
            *("V22", "V22Img2Img", "V22Inpaint", "V22Controlnet", "V22ControlnetImg2Img"),
        )
    },
}
# Folders of the networks that guide. model_index.json does not name them; diffusers has no such.
CLASSIFIER = "classifier"
CLIP = "clip"
AUXILIARY_COMPONENTS = (CLASSIFIER, CLIP)
PREPROCESSOR = "preprocessor_config.json"  # how images are made ready for CLIP
# Schedules of the noise that is added to images that a network takes beside its latents.
NOISING_SCHEDULERS = ("low_res_scheduler", "image_noising_scheduler")
# Not part of drawing an image from words: a filter of results, and a mark.
SKIPPED = ("safety_checker", "watermarker")
# How images are made ready for an image encoder, or else for the filter of results.
IMAGE_PROCESSORS = ("feature_extractor", "image_processor")
IMAGE_PROCESSOR_CLASSES = (
    "CLIPImageProcessor",
    "CLIPFeatureExtractor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
)
IMAGE_ENCODER = "image_encoder"
# Components that these classes want to see named, if only as absent.
NAMED = ("feature_extractor", "image_encoder", "safety_checker")
LAYOUT = "0.42.1"  # the diffusers release whose folder layout is written


@dataclass(frozen=True, kw_only=True)
class PipelineComponents:
    """What a pipeline folder holds."""

    components: Mapping[str, Component]  # unet, vae, text_encoder, ...
    # scheduler_config.json as it is, unknown entries included; none where each of several models
    # has its own
    scheduler: Mapping[str, Any]
    # those of several models, by component
    stage_schedulers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # the configs of NOISING_SCHEDULERS
    noising_schedulers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizers: Mapping[str, TokenizerFiles] = field(default_factory=dict)
    # preprocessor_config.json of those of IMAGE_PROCESSORS that an image encoder needs
    image_processors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    class_name: str = "StableDiffusionPipeline"  # without the prefix of former Flax classes
    options: Mapping[str, Any] = field(default_factory=dict)  # plain values of model_index.json
    absent: tuple[str, ...] = ()  # components named but not there, or skipped
    defaults: Mapping[str, Any] = field(default_factory=dict)  # jaxdiff.json

    @property
    def family_options(self) -> dict[str, Any]:
        """What tells a family beside the networks: plain values, and noising schedules by name."""
        return {**self.options, **self.noising_schedulers}

    @property
    def schedulers(self) -> dict[str, Mapping[str, Any]]:
        """All scheduler configs by component."""
        own = {SCHEDULER: self.scheduler} if has_scheduler(self.class_name) else {}
        return {**own, **self.stage_schedulers, **self.noising_schedulers}

    def stages(self) -> dict[str, "PipelineComponents"]:
        """The models of a folder with several, by name in the order in which they run.

        Of any other this one, without a name.
        """
        stages = FOLDER_STAGES.get(self.class_name)
        if stages is None:
            return {"": self}
        return {stage.name: self._stage(stage) for stage in stages}

    def _stage(self, stage: FolderStage) -> "PipelineComponents":
        def own(table: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
            return {name: table[name] for name in names if name in table}

        return PipelineComponents(
            class_name=stage.class_name,
            components=own(self.components, stage.components),
            tokenizers=own(self.tokenizers, stage.tokenizers),
            scheduler=self.schedulers[stage.scheduler],
            noising_schedulers=own(self.noising_schedulers, stage.noising_schedulers),
            image_processors=own(self.image_processors, stage.image_processors),
            options=self.options,
            defaults=self.defaults.get(stage.name, {}),
        )


def read_pipeline(
    folder: str | pathlib.Path,
    dtype: Dtype | None = None,
    *,
    variant: str | None = None,
    sharding: Placement = None,
    attention: str = "auto",
    only: Container[str] | None = None,
    skip: Container[str] = (),
) -> PipelineComponents:
    """Read a pipeline folder, its weights straight to the device(s) in `dtype`.

    `dtype` None keeps the stored dtypes. A component without `variant` gives its plain weights, but
    one must have it. `sharding` and `attention` are `read_component`'s. `only` names the components
    whose weights are read (None: all); the other modules have shapes. Those in `skip` are passed
    over. Raises InputError, naming the file, for anything missing, broken or unknown.
    """
    folder = pathlib.Path(folder)
    index = {name: value for name, value in read_index(folder).items() if name not in skip}
    classes = component_classes(index, str(folder / INDEX))
    modules = {name: cls for name, cls in classes.items() if cls in MODEL_CLASSES}
    vae = vae_component(index["_class_name"])
    if vae in modules and not (folder / vae).is_dir():
        raise InputError(f"{folder}: got no {vae}/, expected it, or {ANOTHER_VAE}")
    _check_variant(folder, modules, variant)
    # The small files first: what is wrong with them shows before gigabytes are read.
    tokenizers = {
        name: read_tokenizer(folder / name, class_name=cls, source=f"{folder / INDEX}: {name}")
        for name, cls in classes.items()
        if cls and "Tokenizer" in cls
    }
    image_processors = {
        name: read_object(folder / name / PREPROCESSOR)
        for name in IMAGE_PROCESSORS
        if classes.get(name)
    }
    scheduler, of_stages = _schedulers(folder, index, classes)
    noising = _noising_schedulers(folder, classes)
    defaults = read_object(folder / DEFAULTS) if (folder / DEFAULTS).exists() else {}
    defaults = rename_settings(defaults, source=str(folder / DEFAULTS))
    components = {
        name: read_component(
            folder / name,
            class_name=cls,
            dtype=dtype,
            variant=variant if variant in variants(folder / name) else None,
            sharding=sharding,
            attention=attention,
        )
        if only is None or name in only
        else Component(
            module=abstract_component(
                folder / name, class_name=cls, **shape_options({"dtype": dtype})
            ),
            config=read_object(folder / name / CONFIG),
        )
        for name, cls in modules.items()
    }
    return PipelineComponents(
        class_name=index["_class_name"].removeprefix("Flax"),
        components=components,
        scheduler=scheduler,
        stage_schedulers=of_stages,
        noising_schedulers=noising,
        tokenizers=tokenizers,
        image_processors=image_processors,
        options=plain_values(index),
        absent=tuple(name for name, cls in classes.items() if cls is None),
        defaults=defaults,
    )


def read_schedulers(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The scheduler config of a pipeline folder, and those of several models by component.

    Each has the class that model_index.json names.
    """
    index = read_index(folder)
    return _schedulers(folder, index, component_classes(index, str(folder / INDEX)))


def _schedulers(
    folder: pathlib.Path, index: Mapping[str, Any], classes: Mapping[str, str | None]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    name = index["_class_name"].removeprefix("Flax")
    own = _scheduler(folder, classes) if has_scheduler(name) else {}
    return own, {each: _scheduler(folder, classes, each) for each in stage_schedulers(name)}


def _scheduler(
    folder: pathlib.Path, classes: Mapping[str, str | None], name: str = SCHEDULER
) -> dict[str, Any]:
    config = read_object(folder / name / SCHEDULER_CONFIG)
    return config | {"_class_name": classes[name]}


def _noising_schedulers(
    folder: pathlib.Path, classes: Mapping[str, str | None]
) -> dict[str, dict[str, Any]]:
    names = [name for name in NOISING_SCHEDULERS if classes.get(name)]
    return {name: _scheduler(folder, classes, name) for name in names}


def vae_component(class_name: str) -> str:
    """The component that a pipeline class has its VAE in."""
    return VAE_COMPONENTS.get(class_name, VAE_COMPONENT)


def abstract_pipeline(
    folder: pathlib.Path, **options: Any
) -> tuple[str, dict[str, nnx.Module], dict[str, Any]]:
    """Class name, modules as shapes, and options of a pipeline folder; reads no weights.

    The options are the plain values of model_index.json, and the configs of NOISING_SCHEDULERS.

    `options` are those of the modules.
    """
    index = read_index(folder)
    classes = component_classes(index, str(folder / INDEX))
    modules = {
        name: abstract_component(folder / name, class_name=cls, **options)
        for name, cls in classes.items()
        if cls in MODEL_CLASSES
    }
    values = {**plain_values(index), **_noising_schedulers(folder, classes)}
    return index["_class_name"].removeprefix("Flax"), modules, values


def write_pipeline(
    folder: str | pathlib.Path,
    parts: PipelineComponents,
    *,
    dtype: Dtype | None = None,
    flax: bool = False,
) -> None:
    """Write a folder that diffusers loads; it appears whole or not at all.

    `dtype` converts the weights, None keeps them. `flax` writes what diffusers' former Flax classes
    load. A pipeline folder in its place is replaced, where other files beside the components stay;
    any other folder must be empty. InputError for a class that Flax had no counterpart of.
    """
    index, schedulers = _index_of(parts), parts.schedulers
    if flax:
        index = flax_index(index)
        schedulers[SCHEDULER] = {**parts.scheduler, "_class_name": index[SCHEDULER][1]}
    with atomic_folder(pathlib.Path(folder), marker=INDEX, stale=(DEFAULTS,)) as new:
        for name, component in parts.components.items():
            (new / name).mkdir()
            write_files(new / name, component, dtype=dtype, flax=flax)
        for name, tokenizer in parts.tokenizers.items():
            write_tokenizer(new / name, tokenizer)
        for name, config in parts.image_processors.items():
            (new / name).mkdir()
            write_object(new / name / PREPROCESSOR, config)
        for name, config in schedulers.items():
            (new / name).mkdir()
            write_object(new / name / SCHEDULER_CONFIG, config)
        if parts.defaults:
            write_object(new / DEFAULTS, parts.defaults)
        write_object(new / INDEX, index)


def read_index(folder: pathlib.Path) -> dict[str, Any]:
    """model_index.json, which must name its class and the schedulers of that."""
    if not (folder / INDEX).exists():
        raise InputError(f"{folder}: got no {INDEX}, expected a diffusers pipeline folder")
    index = read_object(folder / INDEX)
    if not isinstance(index.get("_class_name"), str):
        got = index.get("_class_name")
        raise InputError(f"{folder / INDEX}: _class_name: got {got!r:.80}, expected a string")
    name = index["_class_name"].removeprefix("Flax")
    needed = (*([SCHEDULER] if has_scheduler(name) else []), *stage_schedulers(name))
    for scheduler in needed:
        if index.get(scheduler) in (None, [None, None]):
            raise InputError(f"{folder / INDEX}: got no {scheduler}, expected one")
    return index


def _entries(index: Mapping[str, Any]) -> dict[str, Any]:
    """The components and options; other entries say by whom the file was written."""
    return {name: value for name, value in index.items() if not name.startswith("_")}


def plain_values(index: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the pipeline in a model_index.json."""
    return {k: v for k, v in _entries(index).items() if not isinstance(v, list)}


def component_classes(index: Mapping[str, Any], source: str) -> dict[str, str | None]:
    """The class of every component, None for one that is absent or skipped.

    An image processor without an image encoder, which is that of the filter of results, is skipped.
    Raises InputError for a class that is not known here.
    """
    classes: dict[str, str | None] = {}
    pipeline = str(index.get("_class_name")).removeprefix("Flax")
    schedulers = (SCHEDULER, *NOISING_SCHEDULERS, *stage_schedulers(pipeline))
    sees = index.get(IMAGE_ENCODER) not in (None, [None, None])
    skipped = SKIPPED if sees else (*SKIPPED, *IMAGE_PROCESSORS)
    for name, value in _entries(index).items():
        if not isinstance(value, list):
            continue
        # The name is a folder's too, and must not lead out of this one.
        absent = value[1:] == [None] and isinstance(value[0], str | None)
        texts = absent or all(isinstance(v, str) for v in value)
        if len(value) != 2 or not texts or not re.fullmatch(r"\w+", name):
            raise InputError(
                f"{source}: got {name!r:.80}: {value!r:.80}, expected [library, class]"
            )
        if name in skipped or value[1] is None:
            classes[name] = None
            continue
        cls = present_name(str(value[1]))
        if name in IMAGE_PROCESSORS:
            one_of(f"{source}: {name}: class", cls, IMAGE_PROCESSOR_CLASSES)
        elif name not in schedulers and "Tokenizer" not in cls:
            one_of(f"{source}: {name}: class", cls, MODEL_CLASSES)
        classes[name] = cls
    return classes


def _check_variant(folder: pathlib.Path, names: Iterable[str], variant: str | None) -> None:
    """InputError unless some component has weights of this variant."""
    found = {v for name in names for v in variants(folder / name)}
    if variant is not None and variant not in found:
        there = ", ".join(sorted(found - {""})) or "none"
        raise InputError(f"{folder}: variant: got {variant!r}, expected one of {there}")


def _index_of(parts: PipelineComponents) -> dict[str, Any]:
    """The model_index.json of `parts`."""
    stable_diffusion = re.fullmatch(
        r"(StableDiffusion(Img2Img|Inpaint)?|LatentConsistencyModel)Pipeline", parts.class_name
    )
    absent = {*parts.absent, *(NAMED if stable_diffusion else ())}
    index: dict[str, Any] = {name: [None, None] for name in absent}
    index |= {"_class_name": parts.class_name, "_diffusers_version": LAYOUT}
    index |= parts.options
    if "safety_checker" in absent and stable_diffusion:
        index["requires_safety_checker"] = False
    for name, component in parts.components.items():
        kind = MODEL_CLASSES[class_name_of(component.module)]
        index[name] = [kind.module_name or kind.library, kind.name]
    for name, tokenizer in parts.tokenizers.items():
        index[name] = ["transformers", tokenizer.class_name]
    index |= {name: ["transformers", IMAGE_PROCESSOR_CLASSES[0]] for name in parts.image_processors}
    for name, config in parts.schedulers.items():
        scheduler = config.get("_class_name")
        if not isinstance(scheduler, str):
            raise InputError(f"{name}: got _class_name {scheduler!r}, expected a string")
        index[name] = ["diffusers", scheduler]
    return index
