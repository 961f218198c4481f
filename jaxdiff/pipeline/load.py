"""`load`: a model folder, or the embedded model, as a `Pipeline`."""

import pathlib

import jax

from jaxdiff.checkpoints.pipelines import read_pipeline
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
) -> Pipeline:
    """The model in a diffusers folder, on all local devices; without `path` the embedded one.

    `dtype` is what the networks compute in and keep their weights in: float32, bfloat16 or float16;
    by default float32 on CPU and bfloat16 elsewhere. `variant` picks weight files such as "fp16".
    Raises InputError for anything missing, broken or unknown.
    """
    devices = jax.local_devices()
    name = dtype or ("float32" if devices[0].platform == "cpu" else "bfloat16")
    cache.enable()
    folder = EMBEDDED if path is None else pathlib.Path(path)
    if not folder.is_dir():
        missing = "this installation has no embedded model" if path is None else "no such folder"
        raise InputError(f"model: got {path or 'none'} ({missing}), expected a diffusers folder")
    parts = read_pipeline(
        folder, dtype_of(name), variant=variant, sharding=replicated(data_mesh(devices))
    )
    return Pipeline(parts, name=folder.resolve().name, devices=devices)
