"""Models as shapes for planning: from config files, or by the name of a published repository."""

import pathlib
from typing import Any

from flax import nnx

from jaxdiff.checkpoints.components import CONFIG, Component, abstract_component
from jaxdiff.checkpoints.pipelines import PipelineComponents, abstract_pipeline
from jaxdiff.checkpoints.tokenizers import TokenizerFiles
from jaxdiff.core.errors import InputError
from jaxdiff.experiments.experiment import FILES, ModelSource
from jaxdiff.families.base import Family
from jaxdiff.families.detection import detect_family
from jaxdiff.models.presets import preset

# Components of published repositories and their presets.
PRESET_REPOSITORIES: dict[str, dict[str, tuple[str, str]]] = {
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


def published_component(path: str | pathlib.Path, **options: Any) -> nnx.Module:
    """The module in the folder `path`, or in that of a published repository, as shapes."""
    folder = pathlib.Path(path)
    if (folder / CONFIG).is_file():
        return abstract_component(folder, **options)
    repository, _, name = str(path).rpartition("/")
    if name not in PRESET_REPOSITORIES.get(repository, {}):
        known = ", ".join(PRESET_REPOSITORIES)
        raise InputError(
            f"plan: got {path} without a config.json, expected one, or a part of {known}"
        )
    return preset(*PRESET_REPOSITORIES[repository][name]).abstract(**options)


def published_model(source: str, **options: Any) -> tuple[Family, dict[str, nnx.Module]]:
    """The family and the networks of a pipeline folder or of a published repository, as shapes."""
    if source in PRESET_REPOSITORIES:
        names = PRESET_REPOSITORIES[source]
        modules = {name: published_component(f"{source}/{name}", **options) for name in names}
        return detect_family("StableDiffusionPipeline", modules, source=source), modules
    class_name, modules, plain = abstract_pipeline(pathlib.Path(source), **options)
    return detect_family(class_name, modules, plain, source=source), modules


def _pipeline(source: str) -> PipelineComponents:
    """The pipeline in a folder or file, or of a published repository, of which nothing is read."""
    if source in PRESET_REPOSITORIES:
        _, modules = published_model(source)
        components = {name: Component(module=module) for name, module in modules.items()}
        return PipelineComponents(components=components, scheduler={})
    if not pathlib.Path(source).exists():  # a Hub repository would be downloaded
        known = ", ".join(PRESET_REPOSITORIES)
        raise InputError(f"plan: got {source}, expected a folder or file that is there, or {known}")
    return FILES.pipeline(source)


def _tokenizers(folder: pathlib.Path) -> dict[str, TokenizerFiles]:
    """None: plans do not read captions."""
    del folder
    return {}


PUBLISHED = ModelSource(published_component, _pipeline, _tokenizers)
