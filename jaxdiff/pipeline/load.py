"""`load`: a model folder, or the embedded model, as a `Pipeline`."""

import pathlib

import jax

from jaxdiff.checkpoints.models import read_model
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import dtype_of
from jaxdiff.parallel.mesh import data_mesh, replicated
from jaxdiff.pipeline import cache
from jaxdiff.pipeline.pipeline import Pipeline

EMBEDDED = pathlib.Path(__file__).parents[1] / "assets" / "scenes"


def load(
    path: str | pathlib.Path | None = None,
    dtype: str | None = None,
    *,
    variant: str | None = None,
    prediction_type: str | None = None,
) -> Pipeline:
    """The model at `path` on all local devices; without `path` the embedded one.

    `path` is a diffusers folder, a checkpoint file in the original layout (.safetensors, .ckpt), or
    a repository of the Hub (owner/name).

    `dtype` is what the networks compute in and keep their weights in: float32, bfloat16 or float16;
    by default float32 on CPU and bfloat16 elsewhere. `variant` picks weight files such as "fp16";
    `prediction_type` says what a single file's network predicts, where the file does not. Raises
    InputError for anything missing, broken or unknown.
    """
    devices = jax.local_devices()
    name = dtype or ("float32" if devices[0].platform == "cpu" else "bfloat16")
    cache.enable()
    if path is None and not EMBEDDED.is_dir():
        raise InputError(
            "model: got none (this installation has no embedded model), expected a diffusers folder"
        )
    source = EMBEDDED if path is None else path
    parts = read_model(
        source,
        dtype_of(name),
        variant=variant,
        prediction_type=prediction_type,
        sharding=replicated(data_mesh(devices)),
    )
    folder = pathlib.Path(source)
    inside = folder if folder.is_dir() else None
    return Pipeline(parts, name=folder.resolve().name, devices=devices, folder=inside)
