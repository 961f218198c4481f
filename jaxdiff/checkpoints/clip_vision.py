"""CLIP's vision tower and image processor from a folder."""

import dataclasses
import pathlib

from flax import nnx

from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.loading import Placement
from jaxdiff.checkpoints.pipelines import PREPROCESSOR
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.clip import CLIPModel, CLIPVisionModel
from jaxdiff.models.image_processor import CLIPImageProcessor

CLIP = "clip"  # the folder of a whole CLIP model among the parts of others
# CLIP's own normalisation (2103.00020), for folders that do not say theirs.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_folder(folder: pathlib.Path) -> pathlib.Path:
    """`folder`/clip if it is there, as exports of CLIP trainings have it, else `folder`."""
    return folder / CLIP if (folder / CLIP).is_dir() else folder


def read_image_processor(folder: pathlib.Path, size: int) -> CLIPImageProcessor:
    """The image processor for `size` that the preprocessor_config.json in `folder` describes."""
    path = folder / PREPROCESSOR
    config = read_object(path) if path.is_file() else {}
    return CLIPImageProcessor(
        size=size,
        mean=tuple(config.get("image_mean", MEAN)),
        std=tuple(config.get("image_std", STD)),
    )


def read_vision(
    folder: pathlib.Path, *, dtype: Dtype | None = None, sharding: Placement = None
) -> tuple[CLIPVisionModel, CLIPImageProcessor]:
    """The vision tower, with its projection if it has one, of the CLIP model in `folder`.

    InputError for a folder of another class. The options are those of `read_component`.
    """
    module = vision_of(read_component(folder, dtype=dtype, sharding=sharding).module, folder)
    return module, read_image_processor(folder, module.config.image_size)


def vision_of(module: nnx.Module, folder: pathlib.Path) -> CLIPVisionModel:
    """The vision tower of the model that is in `folder`, its weights arrays or shapes."""
    if isinstance(module, CLIPModel):
        width = module.visual_projection.kernel.shape[1]
        table = param_dict(module)
        seeing = {k: v for k, v in table.items() if k.startswith(("vision_model.", "visual_"))}
        config = dataclasses.replace(module.vision_model.config, projection_dim=width)
        options = {"dtype": module.vision_model.pre_layrnorm.dtype, "with_projection": True}
        module = with_params(abstract(CLIPVisionModel, config, **options), seeing)
    if not isinstance(module, CLIPVisionModel):
        raise InputError(
            f"clip: got {type(module).__name__} in {folder}, expected CLIPModel or CLIPVisionModel"
        )
    return module
