"""`jaxdiff convert`: models from layout to layout, LoRAs as diffusers spells them."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from jaxdiff.checkpoints.lora_writing import find_lora, write_lora
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.checkpoints.single_file import write_single_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, dtype_of
from jaxdiff.core.validate import one_of

SINGLE = ".safetensors"
FORMATS = ("diffusers", "original", "flax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Write a checkpoint in another layout: a folder, or FILE.safetensors in the original one.

    A LoRA of any spelling becomes FILE.safetensors in that of diffusers and PEFT.
    """

    source: tyro.conf.Positional[str]
    """A diffusers folder (also one of Flax), a .safetensors or .ckpt file, a Hub repository."""
    output: tyro.conf.Positional[pathlib.Path]
    """The diffusers folder to write, or a file whose name ends in .safetensors."""
    format: str | None = None
    """diffusers, original (one file) or flax (a folder for diffusers' former Flax classes)."""
    dtype: str | None = None
    """Of the stored weights: float32, bfloat16 or float16; left out: as they are."""
    variant: str | None = None
    """Which weights of a folder, such as fp16."""
    prediction_type: str | None = None
    """What the network of a single file predicts, where the file does not say."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, read, write. Raises InputError on bad input."""
    options = tyro.cli(Options, args=arguments, prog="jaxdiff convert")
    dtype = None if options.dtype is None else dtype_of(options.dtype)
    lora = find_lora(pathlib.Path(options.source))
    if lora is None:
        files, what = _convert_model(options, dtype)
    else:
        files, what = [options.output], _convert_lora(options, lora, dtype)
    size = sum(path.stat().st_size for path in files)
    print(f"{options.output}: {what}, {size / 1e6:.1f} MB")


def _convert_model(options: Options, dtype: Dtype | None) -> tuple[list[pathlib.Path], str]:
    """The files that were written, and what they are."""
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
    """What was written."""
    for name in ("variant", "prediction_type", "format"):
        if getattr(options, name) is not None:
            raise InputError(f"{name}: got {getattr(options, name)!r} for a LoRA, expected none")
    if options.output.suffix != SINGLE:
        raise InputError(f"output: got {options.output} for a LoRA, expected FILE{SINGLE}")
    return f"LoRA of {write_lora(options.output, lora, dtype=dtype)} modules"


def _check(output: pathlib.Path, layout: str) -> None:
    """InputError for a file's name where a folder is to be written, and the other way round."""
    expected = f"FILE{SINGLE}" if layout == "original" else "a folder"
    if (output.suffix == SINGLE) != (layout == "original"):
        raise InputError(f"output: got {output}, expected {expected} for the format {layout}")
    if output.suffix in (".ckpt", ".pt", ".bin", ".pth", ".msgpack"):
        raise InputError(f"output: got {output}, expected a folder or FILE{SINGLE}")
