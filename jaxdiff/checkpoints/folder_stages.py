"""Pipeline folders that hold several models, which run one after the other."""

import dataclasses
from collections.abc import Mapping

SCHEDULER = "scheduler"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderStage:
    """One of the models: which parts of the folder it has."""

    name: str
    class_name: str  # of a pipeline folder with this model alone
    components: tuple[str, ...]
    tokenizers: tuple[str, ...] = ()
    scheduler: str  # of its steps
    noising_schedulers: tuple[str, ...] = ()
    image_processors: tuple[str, ...] = ()


_KARLO_DECODER = FolderStage(
    name="decoder",
    class_name="UnCLIPDecoderPipeline",
    components=("decoder", "text_proj", "text_encoder"),
    tokenizers=("tokenizer",),
    scheduler="decoder_scheduler",
)
_KARLO_SUPER_RESOLUTION = FolderStage(
    name="super_res",
    class_name="UnCLIPSuperResolutionPipeline",
    components=("super_res_first", "super_res_last"),
    scheduler="super_res_scheduler",
)
# By pipeline class, in the order in which they run.
FOLDER_STAGES: Mapping[str, tuple[FolderStage, ...]] = {
    "StableUnCLIPPipeline": (
        FolderStage(
            name="prior",
            class_name="StableUnCLIPPriorPipeline",
            components=("prior", "prior_text_encoder"),
            tokenizers=("prior_tokenizer",),
            scheduler="prior_scheduler",
        ),
        FolderStage(
            name="decoder",
            class_name="StableUnCLIPDecoderPipeline",
            components=("unet", "vae", "text_encoder", "image_normalizer"),
            tokenizers=("tokenizer",),
            scheduler=SCHEDULER,
            noising_schedulers=("image_noising_scheduler",),
        ),
    ),
    "UnCLIPPipeline": (
        FolderStage(
            name="prior",
            class_name="UnCLIPPriorPipeline",
            components=("prior", "text_encoder"),
            tokenizers=("tokenizer",),
            scheduler="prior_scheduler",
        ),
        _KARLO_DECODER,
        _KARLO_SUPER_RESOLUTION,
    ),
    "UnCLIPImageVariationPipeline": (
        dataclasses.replace(
            _KARLO_DECODER,
            class_name="UnCLIPVariationDecoderPipeline",
            components=(*_KARLO_DECODER.components, "image_encoder"),
            image_processors=("feature_extractor",),
        ),
        _KARLO_SUPER_RESOLUTION,
    ),
}


def stage_schedulers(class_name: str) -> tuple[str, ...]:
    """The schedulers of the models in folders of a class, by component, beside SCHEDULER."""
    names = dict.fromkeys(stage.scheduler for stage in FOLDER_STAGES.get(class_name, ()))
    return tuple(name for name in names if name != SCHEDULER)


def has_scheduler(class_name: str) -> bool:
    """Whether folders of a class have SCHEDULER."""
    stages = FOLDER_STAGES.get(class_name, ())
    return not stages or any(stage.scheduler == SCHEDULER for stage in stages)
