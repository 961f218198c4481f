"""A whole model from wherever it is: a diffusers folder, a single file, the Hub."""

import pathlib
from collections.abc import Container, Iterable

from jaxdiff.checkpoints import hub
from jaxdiff.checkpoints.loading import Placement
from jaxdiff.checkpoints.pipelines import PipelineComponents, read_pipeline
from jaxdiff.checkpoints.single_file import read_single_file
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype


def read_model(
    source: str | pathlib.Path,
    dtype: Dtype | None = None,
    *,
    variant: str | None = None,
    prediction_type: str | None = None,
    sharding: Placement = None,
    only: Container[str] | None = None,
) -> PipelineComponents:
    """The pipeline at `source`: a folder, a file of the original layout, or a Hub repository.

    `variant` picks among the weight files of a folder; `prediction_type` says what the network of a
    single file predicts. The rest is `read_pipeline`'s. Raises InputError.
    """
    path = resolve_source(source, variant=variant)
    if path.is_file():
        if variant is not None:
            raise InputError(f"variant: got {variant!r} for the file {path}, expected a folder")
        return read_single_file(
            path, dtype, prediction_type=prediction_type, sharding=sharding, only=only
        )
    if prediction_type is not None:
        raise InputError(
            f"prediction_type: got {prediction_type!r} for {source}, expected a single file"
        )
    return read_pipeline(path, dtype, variant=variant, sharding=sharding, only=only)


def resolve_source(source: str | pathlib.Path, *, variant: str | None = None) -> pathlib.Path:
    """The folder or file of the model at `source`, downloaded if that is a Hub repository."""
    path = pathlib.Path(source)
    if path.is_file() or path.is_dir():
        return path
    if path.is_absolute() or not hub.is_id(str(source)):
        raise InputError(
            f"model: got {source} (no such file or folder), "
            "expected a diffusers folder, a checkpoint file or a Hub repository"
        )
    return hub.download(str(source), variant=variant)


def weight_hashes(path: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
    """A fingerprint of each component's weights in the folder or file of a model."""
    if path.is_file():
        return dict.fromkeys(names, digest(path))
    return {name: digest(find_weights(path / name)) for name in names}
