"""`jaxdiff convert`: models and VAEs to another layout, LoRAs to the keys of diffusers."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

import tyro

from jaxdiff.checkpoints.layout_stable_diffusion import SD1
from jaxdiff.checkpoints.lora_writing import find_lora, write_lora
from jaxdiff.checkpoints.model_options import COMPONENTS, ComponentOptions
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.checkpoints.single_file import write_single_file
from jaxdiff.checkpoints.vaes import is_vae, open_vae, write_vae
from jaxdiff.cli.arguments import parse
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, dtype_of
from jaxdiff.core.validate import one_of, positive

SINGLE = ".safetensors"
FORMATS = ("diffusers", "original", "flax")
LORA_FORMATS = ("diffusers", "kohya")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ComponentOptions):
    """Convert a checkpoint to another layout.

    A LoRA with any known keys becomes FILE.safetensors with the keys of diffusers (PEFT).
    """

    source: tyro.conf.Positional[str]
    """A diffusers folder (PyTorch or Flax), a .safetensors or .ckpt file, or a Hub repository; also
    a VAE alone."""
    output: tyro.conf.Positional[pathlib.Path]
    """The folder to write (diffusers), or FILE.safetensors (original layout)."""
    format: str | None = None
    """diffusers, original (one file) or flax (a folder for the Flax classes of diffusers). Default:
    what OUTPUT suggests. For a LoRA of a transformer diffusers (default) or kohya."""
    dtype: str | None = None
    """Dtype of the written weights: float32, bfloat16 or float16. Default: unchanged; 8-bit floats
    get that of the other weights."""
    variant: str | None = None
    """Variant of the weights in a folder, such as fp16."""
    scaling_factor: float | None = None
    """Scaling factor of a VAE file, which does not store it, for the folder that is written.
    Default: 0.18215; SDXL has 0.13025."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, read, write. Raises InputError on bad input."""
    options = parse(Options, arguments, prog="jaxdiff convert")
    dtype = None if options.dtype is None else dtype_of(options.dtype)
    lora = find_lora(pathlib.Path(options.source))
    if lora is not None:
        _reject(
            options,
            "a LoRA",
            "variant",
            "scaling_factor",
            *COMPONENTS,
        )
        files, what = [options.output], _convert_lora(options, lora, dtype)
    elif (source := pathlib.Path(options.source)).exists() and is_vae(source):
        _reject(options, "a VAE", *COMPONENTS)
        files, what = _convert_vae(options, dtype)
    else:
        _reject(options, "a whole model", "scaling_factor")
        files, what = _convert_model(options, dtype)
    size = sum(path.stat().st_size for path in files)
    print(f"{options.output}: {what}, {size / 1e6:.1f} MB")


def _convert_model(options: Options, dtype: Dtype | None) -> tuple[list[pathlib.Path], str]:
    """The written files and the class of the pipeline."""
    layout = _layout(options)
    parts = read_model(
        options.source,
        variant=options.variant,
        **options.components(),
    )
    if layout == "original":
        write_single_file(options.output, parts, dtype=dtype)
        return [options.output], parts.class_name
    write_pipeline(options.output, parts, dtype=dtype, flax=layout == "flax")
    return [path for path in options.output.rglob("*") if path.is_file()], parts.class_name


def _convert_lora(options: Options, lora: pathlib.Path, dtype: Dtype | None) -> str:
    """A description of the written LoRA."""
    if options.output.suffix != SINGLE:
        raise InputError(f"output: got {options.output} for a LoRA, expected FILE{SINGLE}")
    spelling = one_of("format", options.format or LORA_FORMATS[0], LORA_FORMATS)
    modules = write_lora(options.output, lora, dtype=dtype, spelling=spelling)
    return f"LoRA of {modules} modules"


def _convert_vae(options: Options, dtype: Dtype | None) -> tuple[list[pathlib.Path], str]:
    """The written files and the class of the VAE."""
    layout = _layout(options)
    vae = open_vae(pathlib.Path(options.source), variant=options.variant)
    if options.scaling_factor is not None:
        positive("scaling_factor", options.scaling_factor)
        if vae.class_name != "AutoencoderKL" or "scaling_factor" in (vae.config or {}):
            raise InputError(
                f"scaling_factor: got {options.scaling_factor} for {vae.path}, which has one, "
                "expected none"
            )
        if layout == "original":
            raise InputError(
                f"scaling_factor: got {options.scaling_factor} for {options.output}, expected "
                "none: a VAE file of the original layout does not hold it"
            )
    factor = SD1.scaling_factor if options.scaling_factor is None else options.scaling_factor
    component = vae.read(scaling={"scaling_factor": factor})
    write_vae(options.output, component, dtype=dtype, layout=layout)
    if layout == "original":
        return [options.output], vae.class_name
    factor = component.module.config.scaling_factor  # pyright: ignore
    return list(options.output.iterdir()), f"{vae.class_name}, scaling factor {factor:g}"


def _reject(options: Options, what: str, *names: str) -> None:
    """InputError for options that say nothing of `what` is converted."""
    for name in names:
        if (value := getattr(options, name)) not in (None, ()):
            raise InputError(f"{name}: got {value!r} for {what}, expected no {name}")


def _layout(options: Options) -> str:
    """The layout to write; InputError unless the name of the output fits it."""
    layout = options.format or ("original" if options.output.suffix == SINGLE else "diffusers")
    _check(options.output, one_of("format", layout, FORMATS))
    return layout


def _check(output: pathlib.Path, layout: str) -> None:
    """InputError unless the name of the output fits the layout."""
    expected = f"FILE{SINGLE}" if layout == "original" else "a folder"
    if (output.suffix == SINGLE) != (layout == "original"):
        raise InputError(f"output: got {output}, expected {expected} for the format {layout}")
    if re.fullmatch(r"\.[a-z]\w*", output.suffix) and layout != "original" and not output.is_dir():
        raise InputError(f"output: got {output}, expected a folder or FILE{SINGLE}")
