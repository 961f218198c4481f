"""`jaxdiff export`: a trained pipeline folder, or what steers its pictures, as it is shipped."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from jaxdiff.checkpoints.components import read_component, write_component
from jaxdiff.checkpoints.jsonfiles import read_object, write_object
from jaxdiff.checkpoints.pipelines import (
    COMPANIONS,
    INDEX,
    PREPROCESSOR,
    read_pipeline,
    write_pipeline,
)
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, dtype_of
from jaxdiff.pipeline.request import Defaults, size_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Write a pipeline folder in another dtype, with the defaults that pictures are drawn with.

    A classifier or CLIP is written as classifier/ or clip/ in OUTPUT, which may be a pipeline's.
    """

    source: tyro.conf.Positional[pathlib.Path]
    """A diffusers folder, or the workdir of a finished training."""
    output: tyro.conf.Positional[pathlib.Path]
    """The folder to write."""
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


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, read, write. Raises InputError on bad input."""
    options = tyro.cli(Options, args=arguments, prog="jaxdiff export")
    dtype = dtype_of(options.dtype)
    inside = options.source / "export"
    source = inside if inside.is_dir() else options.source
    names = ("guidance_scale", "steps", "sampler", "timesteps")
    given = {name: getattr(options, name) for name in names}
    chosen = {name: value for name, value in given.items() if value is not None}
    companions = [name for name in COMPANIONS if (source / name).is_dir()]
    if (source / INDEX).exists() or not companions:
        _export_pipeline(source, options.output, chosen, dtype)
    elif chosen:
        name, value = next(iter(chosen.items()))
        raise InputError(f"{name}: got {value} for {source}, expected a folder with {INDEX}")
    for name in companions:
        write_component(options.output / name, read_component(source / name), dtype=dtype)
        if (source / name / PREPROCESSOR).is_file():
            said = read_object(source / name / PREPROCESSOR)
            write_object(options.output / name / PREPROCESSOR, said)
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{options.output}: {size / 1e6:.1f} MB")


def _export_pipeline(
    source: pathlib.Path, output: pathlib.Path, chosen: Mapping[str, Any], dtype: Dtype
) -> None:
    parts = read_pipeline(source)
    defaults = dict(parts.defaults) | dict(chosen)
    Defaults.of(defaults, parts.scheduler, size_of(None, 1), source="export")
    write_pipeline(output, dataclasses.replace(parts, defaults=defaults), dtype=dtype)
