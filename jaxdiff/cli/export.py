"""`jaxdiff export`: write a trained pipeline, or a network that guides it, for release."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from jaxdiff.cli.arguments import parse
from jaxdiff.core.types import dtype_of
from jaxdiff.experiments.export import export

# Options that become defaults of the pipeline.
DEFAULTS = ("guidance_scale", "steps", "sampler", "timestep_spacing", "closed_vocabulary")


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
    """Default sampler; `jaxdiff generate --help` lists them."""
    timestep_spacing: str | None = None
    """Default spacing of the timesteps."""
    closed_vocabulary: bool | None = None
    """Whether the training captions contained only words that are single tokens; jaxdiff then warns
    of any other word in a prompt."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, read, write. Raises InputError on bad input."""
    options = parse(Options, arguments, prog="jaxdiff export")
    given = {name: getattr(options, name) for name in DEFAULTS}
    chosen = {name: value for name, value in given.items() if value is not None}
    dtype = dtype_of(options.dtype)
    export(options.source, options.output, defaults=chosen, dtype=dtype, ema=options.ema)
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{options.output}: {size / 1e6:.1f} MB")
