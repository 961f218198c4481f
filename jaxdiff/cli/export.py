"""`jaxdiff export`: a trained pipeline folder, or what steers its pictures, as it is shipped."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from jaxdiff.checkpoints.adapter_info import AdapterInfo, find_adapter
from jaxdiff.checkpoints.components import read_component, write_component
from jaxdiff.checkpoints.jsonfiles import read_object, write_object
from jaxdiff.checkpoints.lora_writing import write_lora
from jaxdiff.checkpoints.pipelines import (
    AUXILIARY_COMPONENTS,
    INDEX,
    PREPROCESSOR,
    read_pipeline,
    write_pipeline,
)
from jaxdiff.checkpoints.textual_inversion import convert_inversion
from jaxdiff.checkpoints.training_state import has_checkpoint
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.cli.train import write_export
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, dtype_of
from jaxdiff.experiments.experiment import CHECKPOINTS
from jaxdiff.models.prompt_labels import PROMPT_LABELS
from jaxdiff.pipeline.request import Defaults, size_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Write a pipeline folder in another dtype, with the defaults that pictures are drawn with.

    A classifier or CLIP is written as classifier/ or clip/ in OUTPUT, which may be a pipeline's; a
    LoRA or a textual inversion as the file that it is.
    """

    source: tyro.conf.Positional[pathlib.Path]
    """A diffusers folder, or the workdir of a training."""
    output: tyro.conf.Positional[pathlib.Path]
    """The folder to write."""
    ema: bool = True
    """Of a workdir: the averaged weights; otherwise those of the newest checkpoint as they are."""
    dtype: str = "float16"
    """Of the stored weights: float32, bfloat16 or float16."""
    guidance_scale: float | None = None
    """Default guidance scale."""
    steps: int | None = None
    """Default number of denoising steps."""
    sampler: str | None = None
    """Default sampler."""
    timesteps: str | None = None
    """Default spacing of the steps."""
    closed_vocabulary: bool | None = None
    """Whether the captions trained on had no other words than those that are one token: others in
    a prompt are then warned of."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, read, write. Raises InputError on bad input."""
    options = tyro.cli(Options, args=arguments, prog="jaxdiff export")
    dtype = dtype_of(options.dtype)
    names = ("guidance_scale", "steps", "sampler", "timesteps", "closed_vocabulary")
    given = {name: getattr(options, name) for name in names}
    chosen = {name: value for name, value in given.items() if value is not None}
    with tempfile.TemporaryDirectory() as temporary:
        source = _source(options, pathlib.Path(temporary) / "export")
        _export(source, options.output, chosen, dtype)
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{options.output}: {size / 1e6:.1f} MB")


def _source(options: Options, folder: pathlib.Path) -> pathlib.Path:
    """The folder to export: the one that is named, a training's, or made in `folder` of its state.

    InputError where there is no state to take weights from that are not averaged.
    """
    source = options.source
    if options.ema and (source / "export").is_dir():
        return source / "export"
    if has_checkpoint(source / CHECKPOINTS):
        write_export(source, folder, ema=options.ema)
        return folder
    if not options.ema:
        raise InputError(f"ema: got no for {source} without checkpoints, expected a workdir")
    return source


def _export(
    source: pathlib.Path, output: pathlib.Path, chosen: Mapping[str, Any], dtype: Dtype
) -> None:
    """Write whatever lies in `source`."""
    companions = [name for name in AUXILIARY_COMPONENTS if (source / name).is_dir()]
    pipeline = (source / INDEX).exists()
    files = [] if pipeline else sorted(source.glob("*.safetensors"))
    addons = {file: found.layout for file in files if (found := _addon(file)) is not None}
    if pipeline or not (companions or addons):
        _export_pipeline(source, output, chosen, dtype)
    elif chosen:
        name, value = next(iter(chosen.items()))
        raise InputError(f"{name}: got {value} for {source}, expected a folder with {INDEX}")
    for file, layout in addons.items():
        if layout == "LoRA":
            write_lora(output / file.name, file, dtype=dtype)
        else:
            convert_inversion(output / file.name, file, dtype=dtype)
    for name in companions:
        write_component(output / name, read_component(source / name), dtype=dtype)
        for file in (PREPROCESSOR, PROMPT_LABELS):
            if (source / name / file).is_file():
                write_object(output / name / file, read_object(source / name / file))


def _addon(file: pathlib.Path) -> AdapterInfo | None:
    return find_adapter(file, read_weights(file))


def _export_pipeline(
    source: pathlib.Path, output: pathlib.Path, chosen: Mapping[str, Any], dtype: Dtype
) -> None:
    parts = read_pipeline(source)
    defaults = dict(parts.defaults) | dict(chosen)
    Defaults.of(defaults, parts.scheduler, size_of(None, 1), source="export")
    write_pipeline(output, dataclasses.replace(parts, defaults=defaults), dtype=dtype)
