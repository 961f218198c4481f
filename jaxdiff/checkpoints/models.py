"""A whole model from wherever it is: a diffusers folder, a single file, the Hub."""

import pathlib
from collections.abc import Container, Iterable, Sequence

from jaxdiff.checkpoints import hub
from jaxdiff.checkpoints.base_folder import open_base
from jaxdiff.checkpoints.loading import Placement
from jaxdiff.checkpoints.pipelines import (
    VAE_COMPONENT,
    VAE_COMPONENTS,
    PipelineComponents,
    read_pipeline,
    vae_component,
)
from jaxdiff.checkpoints.single_file import read_single_file
from jaxdiff.checkpoints.text_encoder_files import open_text_encoders
from jaxdiff.checkpoints.vaes import VAESource, open_vae, with_vae
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # endings of checkpoint files


def read_model(
    source: str | pathlib.Path,
    dtype: Dtype | None = None,
    *,
    variant: str | None = None,
    prediction_type: str | None = None,
    sharding: Placement = None,
    only: Container[str] | None = None,
    vae: str | pathlib.Path | None = None,
    base: str | pathlib.Path | None = None,
    text_encoders: str | pathlib.Path | Sequence[str | pathlib.Path] = (),
) -> PipelineComponents:
    """The pipeline at `source`: a folder, a file of the original layout, or a Hub repository.

    `variant` picks among the weight files of a folder; `prediction_type` says what the network of a
    single file predicts. `vae`, a folder, file or repository with a VAE or a whole model, takes the
    place of the model's own, and so do `text_encoders`, files with T5 or CLIP, of those of a single
    file. `base`, a folder or repository, has what a single file lacks. The rest is
    `read_pipeline`'s. Raises InputError.
    """
    # These first: what is wrong with them shows before gigabytes are read.
    other = None if vae is None else _open_vae(vae, variant)
    texts = open_text_encoders(_listed(text_encoders))
    skip = () if other is None else (VAE_COMPONENT, *VAE_COMPONENTS.values())
    path = resolve_source(source, variant=variant)
    if base is not None and not path.is_file():
        raise InputError(
            f"base: got {str(base)!r} for {source}, expected a single file as the model, since a "
            "folder has all of its components"
        )
    if texts and not path.is_file():
        raise InputError(
            f"text_encoders: got {texts[0].path} for {source}, expected a single file as the "
            "model, since a folder has its own"
        )
    if path.is_file():
        if variant is not None and base is None:
            raise InputError(f"variant: got {variant!r} for the file {path}, expected a folder")
        folder = None if base is None else resolve_source(base, variant=variant, name="base")
        parts = read_single_file(
            path,
            dtype,
            prediction_type=prediction_type,
            base=None if folder is None else open_base(folder),
            text_encoders=texts,
            variant=variant,
            sharding=sharding,
            only=only,
            skip=skip,
        )
    elif prediction_type is not None:
        raise InputError(
            f"prediction_type: got {prediction_type!r} for {source}, expected a single file"
        )
    else:
        parts = read_pipeline(path, dtype, variant=variant, sharding=sharding, only=only, skip=skip)
    if other is None:
        return parts
    weights = only is None or vae_component(parts.class_name) in only
    return with_vae(parts, other, dtype, model=path, sharding=sharding, weights=weights)


def _listed(paths: str | pathlib.Path | Sequence[str | pathlib.Path]) -> list[pathlib.Path]:
    """The paths, which may be one alone."""
    given = [paths] if isinstance(paths, str | pathlib.Path) else paths
    return [pathlib.Path(path) for path in given]


def _open_vae(source: str | pathlib.Path, variant: str | None) -> VAESource:
    """The VAE at `source`, which is downloaded if that is a Hub repository."""
    path = pathlib.Path(source)
    if not path.exists():
        if path.is_absolute() or not hub.is_id(str(source)):
            raise InputError(
                f"vae: got {source} (no such file or folder), expected a file or folder with a "
                "VAE, or a Hub repository"
            )
        path = hub.download(str(source), variant=variant, component=VAE_COMPONENT)
    return open_vae(path, variant=variant)


def resolve_source(
    source: str | pathlib.Path, *, variant: str | None = None, name: str = "model"
) -> pathlib.Path:
    """The folder or file of the model at `source`, downloaded if that is a Hub repository.

    `name` is that of the option that named it, for errors.
    """
    check_source(source, name=name)
    path = pathlib.Path(source)
    there = path.is_file() or path.is_dir()
    return path if there else hub.download(str(source), variant=variant)


def check_source(source: str | pathlib.Path, *, name: str = "model") -> None:
    """InputError unless `source` is a folder, a checkpoint file, or can be a Hub repository."""
    path = pathlib.Path(source)
    if path.is_dir():
        return
    reason = None
    if path.is_file():
        if path.suffix not in SINGLE_FILES and ".index." not in path.name:
            reason = f"a file that ends in {path.suffix}" if path.suffix else "no extension"
    elif path.is_absolute() or path.suffix in SINGLE_FILES or not hub.is_id(str(source)):
        reason = "no such file or folder"
    if reason is not None:
        raise InputError(
            f"{name}: got {source} ({reason}), expected a diffusers folder, a checkpoint file "
            f"({', '.join(SINGLE_FILES)}) or a Hub repository (owner/name)"
        )


def weight_hashes(path: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
    """A fingerprint of each component's weights in the folder or file of a model."""
    if path.is_file():
        return dict.fromkeys(names, digest(path))
    return {name: digest(find_weights(path / name)) for name in names}
