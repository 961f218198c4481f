"""`jaxdiff export`: a trained pipeline folder as the one that is shipped."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.core.types import dtype_of
from jaxdiff.pipeline.request import Defaults, size_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Write a pipeline folder in another dtype, with the defaults that pictures are drawn with."""

    source: tyro.conf.Positional[pathlib.Path]
    """A diffusers folder, such as a finished training's export/."""
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
    parts = read_pipeline(options.source)
    names = ("guidance_scale", "steps", "sampler", "timesteps")
    chosen = {name: getattr(options, name) for name in names}
    defaults = dict(parts.defaults) | {k: v for k, v in chosen.items() if v is not None}
    Defaults.of(defaults, parts.scheduler, size_of(None, 1), source="export")
    write_pipeline(options.output, dataclasses.replace(parts, defaults=defaults), dtype=dtype)
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{options.output}: {size / 1e6:.1f} MB")
