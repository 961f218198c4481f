"""Which family a model is of: the one place where it is detected."""

import pathlib
from collections.abc import Mapping
from typing import Any

from flax import nnx

from jaxdiff.checkpoints.folder_stages import FOLDER_STAGES
from jaxdiff.checkpoints.pipelines import INDEX, PipelineComponents, abstract_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.families import stable_diffusion
from jaxdiff.families.base import Family
from jaxdiff.families.registry import DETECT


def detect_family(
    class_name: str,
    components: Mapping[str, nnx.Module],
    options: Mapping[str, Any] | None = None,
    *,
    source: str,
) -> Family:
    """The family of a model, whose modules may be shapes; InputError, from `source`, for none.

    `options` are the plain values of model_index.json and the configs of noising schedulers.
    """
    if class_name in FOLDER_STAGES:
        names = ", ".join(stage.name for stage in FOLDER_STAGES[class_name])
        raise InputError(
            f"{source}: got {class_name}, which is several models ({names}), expected one model"
        )
    detect = DETECT[one_of(f"{source}: pipeline class", class_name, DETECT)]
    return detect(components, {"_class_name": class_name, **(options or {})}, source=source)


def family_of(parts: PipelineComponents, source: str) -> Family:
    """The family of a pipeline; InputError, from `source`, unless it can be run here."""
    modules = {name: component.module for name, component in parts.components.items()}
    family = detect_family(parts.class_name, modules, parts.family_options, source=source)
    for encoder in family.text_encoders:
        if encoder.tokenizer not in parts.tokenizers:
            raise InputError(f"{source}: {encoder.tokenizer}: got none, expected a tokenizer")
    return family


def family_of_folder(folder: pathlib.Path) -> Family:
    """The family of a pipeline folder, or of one with text encoders alone; reads no weights."""
    if not (folder / INDEX).is_file():
        return stable_diffusion.family_of_text_encoders(folder)
    class_name, modules, options = abstract_pipeline(folder)
    return detect_family(class_name, modules, options, source=str(folder))
