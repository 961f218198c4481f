"""CLIP's vision tower and image processor from a folder."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from flax import nnx

from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.loading import Place, Placement, host_memory
from jaxdiff.checkpoints.pipelines import PREPROCESSOR
from jaxdiff.core.configs import prefix_errors, typed
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype
from jaxdiff.core.validate import one_of
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.clip import CLIPModel, CLIPVisionModel
from jaxdiff.models.image_processor import CLIPImageProcessor

_SEEING = "vision_model.", "visual_"  # how the paths of the vision tower's weights begin
CLIP = "clip"  # the folder of a whole CLIP model among the parts of others
# CLIP's own normalisation (2103.00020), for folders that do not say theirs.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Settings of other processors than CLIP's, with the values that are CLIP's.
FIXED: dict[str, tuple[Any, ...]] = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_pad": (False, None),
    "resample": (3,),  # bicubic
}


def clip_folder(folder: pathlib.Path) -> pathlib.Path:
    """`folder`/clip if it is there, as exports of CLIP trainings have it, else `folder`."""
    return folder / CLIP if (folder / CLIP).is_dir() else folder


def read_image_processor(folder: pathlib.Path, size: int) -> CLIPImageProcessor:
    """The image processor for `size` that the preprocessor_config.json in `folder` describes."""
    path = folder / PREPROCESSOR
    config = read_object(path) if path.is_file() else {}
    return image_processor_of(config, size, source=str(path))


def image_processor_of(config: Mapping[str, Any], size: int, *, source: str) -> CLIPImageProcessor:
    """The image processor of a preprocessor_config.json, for an encoder of images of `size`.

    Absent keys have transformers' defaults, and sizes those of the encoder. InputError, which
    begins with `source`, for settings of another processor or another encoder.
    """
    for name, accepted in FIXED.items():
        if name in config:
            one_of(f"{source}: {name}", config[name], accepted)
    with prefix_errors(source):
        factor = typed("rescale_factor", config.get("rescale_factor", 1 / 255), float)
        if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
            raise InputError(f"rescale_factor: got {factor}, expected 1/255")
        crops = typed("do_center_crop", config.get("do_center_crop", True), bool)
        edge, results = config.get("size", size), []  # and which sizes the results would have
        if isinstance(edge, Mapping) and "shortest_edge" in edge:
            edge = edge["shortest_edge"]
        elif isinstance(edge, Mapping):
            results, edge = [_sides("size", edge)], None
        if crops:
            results.append(_sides("crop_size", config.get("crop_size", size)))
        if set(results) != {(size, size)}:
            raise InputError(
                f"size, crop_size, do_center_crop: got {config.get('size')}, "
                f"{config.get('crop_size')}, {crops}, expected images of {size} x {size}"
            )
        return CLIPImageProcessor(
            size=size,
            mean=typed("image_mean", config.get("image_mean", MEAN), tuple[float, float, float]),
            std=typed("image_std", config.get("image_std", STD), tuple[float, float, float]),
            shortest_edge=typed("size", edge, int | None),
            crops=edge is not None,
        )


def _sides(name: str, value: Any) -> tuple[int, int]:
    """Height and width, which one number says for both."""
    pair = (value.get("height"), value.get("width")) if isinstance(value, Mapping) else (value,) * 2
    return typed(name, pair, tuple[int, int])


def read_vision(
    folder: pathlib.Path, *, dtype: Dtype | None = None, sharding: Placement = None
) -> tuple[CLIPVisionModel, CLIPImageProcessor]:
    """The vision tower, with its projection if it has one, of the CLIP model in `folder`.

    InputError for a folder of another class. The options are those of `read_component`; what is of
    the text stays on the host.
    """
    host = host_memory()

    def place(path: str, shape: tuple[int, ...]) -> Place:
        if not path.startswith(_SEEING):
            return host
        return sharding(path, shape) if callable(sharding) else sharding

    module = vision_of(read_component(folder, dtype=dtype, sharding=place).module, folder)
    return module, read_image_processor(folder, module.config.image_size)


def vision_of(module: nnx.Module, folder: pathlib.Path) -> CLIPVisionModel:
    """The vision tower of the model that is in `folder`, its weights arrays or shapes."""
    if isinstance(module, CLIPModel):
        width = module.visual_projection.kernel.shape[1]
        table = param_dict(module)
        seeing = {k: v for k, v in table.items() if k.startswith(_SEEING)}
        config = dataclasses.replace(module.vision_model.config, projection_dim=width)
        options = {"dtype": module.vision_model.pre_layrnorm.dtype, "with_projection": True}
        module = with_params(abstract(CLIPVisionModel, config, **options), seeing)
    if not isinstance(module, CLIPVisionModel):
        raise InputError(
            f"clip: got {type(module).__name__} in {folder}, expected CLIPModel or CLIPVisionModel"
        )
    return module
