"""`jaxdiff convert`: models from one layout to another, LoRAs to the keys of diffusers."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from jaxdiff.checkpoints.lora_writing import find_lora, write_lora
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.checkpoints.single_file import write_single_file
from jaxdiff.cli.arguments import parse
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, dtype_of
from jaxdiff.core.validate import one_of

SINGLE = ".safetensors"
FORMATS = ("diffusers", "original", "flax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a checkpoint to another layout.

    A LoRA with any known keys becomes FILE.safetensors with the keys of diffusers (PEFT).
    """

    source: tyro.conf.Positional[str]
    """A diffusers folder (PyTorch or Flax), a .safetensors or .ckpt file, or a Hub repository."""
    output: tyro.conf.Positional[pathlib.Path]
    """The folder to write (diffusers), or FILE.safetensors (original layout)."""
    format: str | None = None
    """diffusers, original (one file) or flax (a folder for the Flax classes of diffusers). Default:
    what OUTPUT suggests."""
    dtype: str | None = None
    """Dtype of the written weights: float32, bfloat16 or float16. Default: unchanged."""
    variant: str | None = None
    """Variant of the weights in a folder, such as fp16."""
    prediction_type: str | None = None
    """What the network of a checkpoint file predicts. Default: what the file says."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, read, write. Raises InputError on bad input."""
    options = parse(Options, arguments, prog="jaxdiff convert")
    dtype = None if options.dtype is None else dtype_of(options.dtype)
    lora = find_lora(pathlib.Path(options.source))
    if lora is None:
        files, what = _convert_model(options, dtype)
    else:
        files, what = [options.output], _convert_lora(options, lora, dtype)
    size = sum(path.stat().st_size for path in files)
    print(f"{options.output}: {what}, {size / 1e6:.1f} MB")


def _convert_model(options: Options, dtype: Dtype | None) -> tuple[list[pathlib.Path], str]:
    """The written files and the class of the pipeline."""
    layout = options.format or ("original" if options.output.suffix == SINGLE else "diffusers")
    _check(options.output, one_of("format", layout, FORMATS))
    parts = read_model(
        options.source, variant=options.variant, prediction_type=options.prediction_type
    )
    if layout == "original":
        write_single_file(options.output, parts, dtype=dtype)
        return [options.output], parts.class_name
    write_pipeline(options.output, parts, dtype=dtype, flax=layout == "flax")
    return [path for path in options.output.rglob("*") if path.is_file()], parts.class_name


def _convert_lora(options: Options, lora: pathlib.Path, dtype: Dtype | None) -> str:
    """A description of the written LoRA."""
    for name in ("variant", "prediction_type", "format"):
        if getattr(options, name) is not None:
            raise InputError(
                f"{name}: got {getattr(options, name)!r} for a LoRA, expected no {name}"
            )
    if options.output.suffix != SINGLE:
        raise InputError(f"output: got {options.output} for a LoRA, expected FILE{SINGLE}")
    return f"LoRA of {write_lora(options.output, lora, dtype=dtype)} modules"


def _check(output: pathlib.Path, layout: str) -> None:
    """InputError unless the name of the output fits the layout."""
    expected = f"FILE{SINGLE}" if layout == "original" else "a folder"
    if (output.suffix == SINGLE) != (layout == "original"):
        raise InputError(f"output: got {output}, expected {expected} for the format {layout}")
    if output.suffix in (".ckpt", ".pt", ".bin", ".pth", ".msgpack"):
        raise InputError(f"output: got {output}, expected a folder or FILE{SINGLE}")
