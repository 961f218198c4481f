"""The frozen image encoder of trainings whose networks generate or read embeddings of images."""

import dataclasses
import pathlib
from typing import Any

from jaxdiff.checkpoints.clip_vision import clip_folder, image_processor_of, read_vision, vision_of
from jaxdiff.checkpoints.components import Component
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.loading import Placement, host_memory
from jaxdiff.checkpoints.pipelines import (
    IMAGE_ENCODER,
    IMAGE_PROCESSORS,
    PREPROCESSOR,
    PipelineComponents,
)
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.core.errors import InputError, errors_of
from jaxdiff.core.types import Dtype
from jaxdiff.experiments.experiment import ModelSource
from jaxdiff.families.base import Family
from jaxdiff.models.clip import CLIPVisionModel
from jaxdiff.models.image_processor import CLIPImageProcessor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """CLIP's image encoder in a folder, as shapes, and how its images are made ready."""

    module: CLIPVisionModel
    processor_config: dict[str, Any]  # preprocessor_config.json
    folder: pathlib.Path | None = None  # None: it is a component of the pipeline

    @property
    def processor(self) -> CLIPImageProcessor:
        """The image processor; InputError for one of another encoder."""
        source = f"objective.image_encoder: {self.folder or IMAGE_ENCODER}"
        size = self.module.config.image_size
        return image_processor_of(self.processor_config, size, source=source)

    def read(self, dtype: Dtype | None = None, sharding: Placement = None) -> CLIPVisionModel:
        """The encoder of the folder with its weights; options as `read_vision`."""
        return read_vision(self.folder or pathlib.Path(), dtype=dtype, sharding=sharding)[0]

    def added_to(self, pipeline: PipelineComponents) -> PipelineComponents:
        """The pipeline with the encoder, if it has none, and with its image processor."""
        if self.folder is None:
            return pipeline
        own = {IMAGE_ENCODER: Component(module=self.read(sharding=host_memory()))}
        return dataclasses.replace(
            pipeline,
            components={**pipeline.components, **own},
            image_processors={IMAGE_PROCESSORS[1]: self.processor_config},
        )

    def digest(self) -> str:
        """Of the weights in the folder."""
        return digest(find_weights(self.folder or pathlib.Path()))


def find_image_encoder(source: str, models: ModelSource) -> ImageEncoder:
    """That in the folder `source`, or in its image_encoder/ or clip/."""
    root = pathlib.Path(source)
    own = root / IMAGE_ENCODER
    folder = own if own.is_dir() else clip_folder(root)
    with errors_of("objective.image_encoder"):
        module = vision_of(models.component(folder), folder)
    if module.visual_projection is None:
        raise InputError(
            f"objective.image_encoder: got {type(module).__name__} without a projection in "
            f"{folder}, expected a CLIPVisionModelWithProjection or a CLIPModel"
        )
    places = (folder, *(root / name for name in IMAGE_PROCESSORS))
    files = [place / PREPROCESSOR for place in places if (place / PREPROCESSOR).is_file()]
    config = read_object(files[0]) if files else {}
    return ImageEncoder(module=module, processor_config=config, folder=folder)


def image_encoder_of(
    pipeline: PipelineComponents, family: Family, source: str | None, models: ModelSource
) -> ImageEncoder | None:
    """The encoder of a family that has one: the pipeline's, or that in `source`.

    InputError for none, for two, and for one that no network of the family reads.
    """
    name = family.image_encoder
    part = pipeline.components.get(name or "")
    given = f"objective.image_encoder: got {source}"
    if name is None or (part is not None and source is not None):
        why = "the network needs none" if name is None else "the pipeline has one"
        if source is not None:
            raise InputError(f"{given}, expected it left out: {why}")
        return None
    if part is None:
        if source is None:
            raise InputError(
                "objective.image_encoder: got none, expected the folder of one: the network "
                f"({family.name}) reads its embeddings"
            )
        return find_image_encoder(source, models)
    config = next(iter(pipeline.image_processors.values()), {})
    return ImageEncoder(
        module=vision_of(part.module, pathlib.Path(name)), processor_config=dict(config)
    )
