"""Weights in 8-bit floats with a scale of their own, as ComfyUI writes them. No jax here.

| spelling | beside `LAYER.weight`                                          | marks                |
| -------- | -------------------------------------------------------------- | -------------------- |
| old      | `LAYER.scale_weight`, perhaps `LAYER.scale_input`              | `scaled_fp8`         |
| new      | `LAYER.weight_scale`, perhaps `LAYER.input_scale`              | `LAYER.comfy_quant`, |
|          |                                                                | or in the header     |

The weight is the stored one times its scale. Scales of inputs and the marks change none. Without a
scale an 8-bit float is its value. Other formats are refused by name.
"""

import pathlib
import re
from collections.abc import Mapping
from dataclasses import replace

from jaxdiff.checkpoints.jsonfiles import parse_object
from jaxdiff.checkpoints.safetensors import (
    FLOAT8,
    FLOATS,
    TensorInfo,
    read_metadata,
    read_tensor,
)
from jaxdiff.core.errors import InputError

HEADER = "_quantization_metadata"  # JSON in the header: {"layers": {LAYER: {"format": ...}}}
FORMATS = ("float8_e4m3fn", "float8_e5m2")
SCALES = (".scale_weight", ".weight_scale")
_NO_EFFECT = re.compile(r"(.+\.)?(scale_input|input_scale|scaled_fp8|comfy_quant)")
_UNSUPPORTED = {
    "nvfp4": r"\.weight_scale_2$",
    "block scales": r"\.weight_scale_inv$",
    "bitsandbytes": r"\.(quant_state\.bitsandbytes__\w+|absmax|nested_absmax|quant_map|SCB)$",
    "SVDQuant or GPTQ": r"\.(qweight|qzeros|wscales|smooth_factor)$",
}


def with_scales(entries: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a file, weights with their scales; those and marks are none of them.

    Raises InputError for a scale that belongs to no weight, and for other formats.
    """
    found = {name: entry for name, entry in entries.items() if not _NO_EFFECT.fullmatch(name)}
    if len(found) == len(entries) and not any(
        entry.dtype in FLOAT8 or name.endswith(SCALES) or _unsupported(name)
        for name, entry in entries.items()
    ):
        return found
    _check_formats(entries)
    for name, entry in entries.items():
        if kind := _unsupported(name):
            raise InputError(f"{entry.path}: {name}: got {kind}, expected {', '.join(FORMATS)}")
        if name.endswith(SCALES):
            del found[name]
            weight = f"{name.rpartition('.')[0]}.weight"
            found[weight] = replace(_scaled(entry, found.get(weight)), scale=entry)
    return found


def _scaled(scale: TensorInfo, weight: TensorInfo | None) -> TensorInfo:
    """The weight that a scale belongs to; InputError unless it is one that the scale fits."""
    if weight is None or weight.scale is not None:
        got = "no weight" if weight is None else "two scales"
        raise InputError(f"{scale.path}: {scale.name}: got {got} of this layer, expected one")
    if scale.shape not in ((), (1,)) or scale.dtype not in FLOATS:
        raise InputError(
            f"{scale.path}: {scale.name}: got {scale.dtype} {scale.shape}, expected one number"
        )
    if weight.dtype not in (*FLOATS, *FLOAT8):
        raise InputError(
            f"{weight.path}: {weight.name}: got {weight.dtype} with a scale, expected "
            f"{', '.join(FORMATS)}"
        )
    return weight


def _unsupported(name: str) -> str | None:
    return next((kind for kind, form in _UNSUPPORTED.items() if re.search(form, name)), None)


def _check_formats(entries: Mapping[str, TensorInfo]) -> None:
    """InputError for a layer whose marks name another format."""
    stated: dict[str, dict] = {}
    for name, entry in entries.items():
        if name.endswith(".comfy_quant"):
            where = f"{entry.path}: {name}"
            stated[where] = parse_object(read_tensor(entry).tobytes(), where)
    for path in {entry.path for entry in entries.values() if entry.path.suffix == ".safetensors"}:
        stated |= _stated_in_header(path)
    for where, values in stated.items():
        form = values.get("format")
        if form not in FORMATS:
            raise InputError(f"{where}: got the format {form!r:.60}, expected {', '.join(FORMATS)}")


def _stated_in_header(path: pathlib.Path) -> dict[str, dict]:
    text = read_metadata(path).get(HEADER)
    if text is None:
        return {}
    where = f"{path} ({HEADER})"
    layers = parse_object(text.encode(), where).get("layers")
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise InputError(f"{where}: got layers {layers!r:.60}, expected an object of objects")
    return {f"{where}: {layer}": values for layer, values in layers.items()}
