"""`jaxdiff export`: write a trained pipeline, or a network that guides it, for release."""

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
    """Write a pipeline folder with other default options or in another dtype.

    A classifier or CLIP becomes classifier/ or clip/ in OUTPUT, which may be a pipeline folder. A
    LoRA or a textual inversion stays a file.
    """

    source: tyro.conf.Positional[pathlib.Path]
    """A diffusers folder or the workdir of a training."""
    output: tyro.conf.Positional[pathlib.Path]
    """Output folder."""
    ema: bool = True
    """Export the EMA weights of a workdir, otherwise the plain weights of its newest checkpoint."""
    dtype: str = "float16"
    """Dtype of the written weights: float32, bfloat16 or float16."""
    guidance_scale: float | None = None
    """Default guidance scale."""
    steps: int | None = None
    """Default number of denoising steps."""
    sampler: str | None = None
    """Default sampler."""
    timestep_spacing: str | None = None
    """Default spacing of the timesteps."""
    closed_vocabulary: bool | None = None
    """Whether the training captions contained only words that are single tokens; jaxdiff then warns
    of any other word in a prompt."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, read, write. Raises InputError on bad input."""
    options = tyro.cli(Options, args=arguments, prog="jaxdiff export")
    dtype = dtype_of(options.dtype)
    names = ("guidance_scale", "steps", "sampler", "timestep_spacing", "closed_vocabulary")
    given = {name: getattr(options, name) for name in names}
    chosen = {name: value for name, value in given.items() if value is not None}
    with tempfile.TemporaryDirectory() as temporary:
        source = _source(options, pathlib.Path(temporary) / "export")
        _export(source, options.output, chosen, dtype)
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{options.output}: {size / 1e6:.1f} MB")


def _source(options: Options, folder: pathlib.Path) -> pathlib.Path:
    """The folder to export: SOURCE, the export of a workdir, or one made in `folder`.

    InputError for plain weights where there is no checkpoint.
    """
    source = options.source
    if options.ema and (source / "export").is_dir():
        return source / "export"
    if has_checkpoint(source / CHECKPOINTS):
        write_export(source, folder, ema=options.ema)
        return folder
    if not options.ema:
        raise InputError(f"ema: got false for {source}, expected a workdir with checkpoints")
    return source


def _export(
    source: pathlib.Path, output: pathlib.Path, chosen: Mapping[str, Any], dtype: Dtype
) -> None:
    """Write the pipeline or the components in `source`."""
    auxiliary = [name for name in AUXILIARY_COMPONENTS if (source / name).is_dir()]
    pipeline = (source / INDEX).exists()
    files = [] if pipeline else sorted(source.glob("*.safetensors"))
    adapters = {file: found.layout for file in files if (found := _find_adapter(file)) is not None}
    if pipeline or not (auxiliary or adapters):
        _export_pipeline(source, output, chosen, dtype)
    elif chosen:
        name, value = next(iter(chosen.items()))
        raise InputError(f"{name}: got {value} for {source}, expected a folder with {INDEX}")
    for file, layout in adapters.items():
        if layout == "LoRA":
            write_lora(output / file.name, file, dtype=dtype)
        else:
            convert_inversion(output / file.name, file, dtype=dtype)
    for name in auxiliary:
        write_component(output / name, read_component(source / name), dtype=dtype)
        for file in (PREPROCESSOR, PROMPT_LABELS):
            if (source / name / file).is_file():
                write_object(output / name / file, read_object(source / name / file))


def _find_adapter(file: pathlib.Path) -> AdapterInfo | None:
    return find_adapter(file, read_weights(file))


def _export_pipeline(
    source: pathlib.Path, output: pathlib.Path, chosen: Mapping[str, Any], dtype: Dtype
) -> None:
    parts = read_pipeline(source)
    defaults = dict(parts.defaults) | dict(chosen)
    Defaults.of(defaults, parts.scheduler, size_of(None, 1), source="export")
    write_pipeline(output, dataclasses.replace(parts, defaults=defaults), dtype=dtype)
