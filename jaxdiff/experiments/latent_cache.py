"""Whether a latent cache was made with the networks of a diffusion training."""

import pathlib

from jaxdiff.checkpoints.tokenizers import tokenizer_digest
from jaxdiff.core.errors import InputError
from jaxdiff.data.latents import DESCRIPTION, LatentCacheInfo, read_description
from jaxdiff.experiments.base_model import BaseModel
from jaxdiff.training.config import DataConfig, TrainConfig
from jaxdiff.training.objectives.diffusion import ParameterPartition


def read_latent_cache(config: TrainConfig) -> LatentCacheInfo | None:
    """The latent cache of the data, if they are one and it exists already."""
    data = config.data
    if data.kind != "latents" or not (pathlib.Path(str(data.path)) / DESCRIPTION).is_file():
        return None
    return read_description(pathlib.Path(str(data.path)))


def check_latent_cache(
    data: DataConfig, base: BaseModel, partition: ParameterPartition, *, field: str = "data"
) -> LatentCacheInfo | None:
    """The cache in the config's `field`; None if the data are images.

    InputError if it was made with other networks, or the training changes them.
    """
    if data.kind != "latents":
        return None
    folder, codec = pathlib.Path(str(data.path)), base.family.latent_codec
    if codec is None:
        raise InputError(
            f"{field}.kind: got latents for {base.family.name}, which works on pixels, expected "
            "images"
        )
    info, vae_digest = read_description(folder), base.digests[codec]
    if info.vae != vae_digest:
        raise InputError(
            f"{field}.path: got {folder}, encoded by a VAE with the digest {info.vae}, expected "
            f"{vae_digest} as {base.objective.vae} has"
        )
    if data.text_embeddings and not info.text_embedding_shapes:
        raise InputError(
            f"{field}.text_embeddings: got it for {folder} with captions alone, expected latents "
            "of cache-latents --texts embeddings"
        )
    if info.text_embedding_shapes:
        _check_text_is_frozen(data, partition, field)
        _check_text_encoders(info, base, f"{field}.path: got {folder} with embeddings of captions")
    return info


def _check_text_is_frozen(data: DataConfig, partition: ParameterPartition, field: str) -> None:
    """InputError if the training changes text encoders or captions."""
    prefixes = tuple(f"{name}." for name in partition.family.id_columns)
    if any(path.startswith(prefixes) for path in partition.shapes):
        raise InputError(
            f"{field}.path: got {data.path} with embeddings of captions for a training of what "
            "text encoders say, expected latents with captions alone (cache-latents without "
            "--texts embeddings)"
        )
    if data.caption is not None:
        raise InputError(
            f"{field}.caption: got {data.caption!r}, expected it left out: {data.path} has "
            "embeddings of its own captions"
        )


def _check_text_encoders(info: LatentCacheInfo, base: BaseModel, got: str) -> None:
    """InputError unless captions were encoded with the training's text encoders."""
    objective, names = base.objective, list(base.text_encoders)
    files = [base.pipeline.tokenizers[spec.tokenizer] for spec in base.family.text_encoders]
    pairs = {
        "text encoders with the digests": (
            info.text_encoders,
            tuple(base.digests[name] for name in names),
        ),
        "tokenizers with the digests": (info.tokenizers, tuple(map(tokenizer_digest, files))),
    }
    for what, (found, expected) in pairs.items():
        if found != expected:
            raise InputError(
                f"{got} by {what} {', '.join(found)}, expected {', '.join(expected)} as "
                f"{objective.text_encoder} has"
            )
    pooled = base.family.has_pooled
    if pooled != bool(info.pooled_width):
        found, expected = ("with" if x else "without" for x in (info.pooled_width, pooled))
        raise InputError(
            f"{got} {found} pooled embeddings, expected them {expected}, as the UNet needs"
        )
    masked = any(spec.mask is not None for spec in base.family.text_encoders)
    if masked != any(info.masked):
        found, expected = ("with" if x else "without" for x in (any(info.masked), masked))
        raise InputError(
            f"{got} {found} masks of the text, expected them {expected}, as {base.family.name} is"
        )
