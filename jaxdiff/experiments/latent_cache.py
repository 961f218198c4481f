"""Whether what is cached is of the networks that a diffusion training has."""

import pathlib

from jaxdiff.checkpoints.tokenizers import tokenizer_digest
from jaxdiff.core.errors import InputError
from jaxdiff.data.latents import LatentCacheInfo, read_description
from jaxdiff.experiments.base_model import Begun
from jaxdiff.models.conditioning import ENCODERS
from jaxdiff.pipeline.parts import ENCODERS as TOKENIZERS
from jaxdiff.training.config import DataConfig
from jaxdiff.training.objectives.trainable import Tuned


def cached(
    data: DataConfig, begun: Begun, tuned: Tuned, *, field: str = "data"
) -> LatentCacheInfo | None:
    """What is cached of the data in the config's `field`; None where that is pictures.

    InputError if other networks have made it, or the training changes one that has.
    """
    if data.kind != "latents":
        return None
    folder = pathlib.Path(str(data.path))
    made, own = read_description(folder), begun.digests["vae"]
    if made.vae != own:
        raise InputError(
            f"{field}.path: got {folder}, encoded by a VAE with the digest {made.vae}, expected "
            f"{own} as {begun.objective.vae} has"
        )
    if made.text_embedding_shapes:
        _check_learnt(data, tuned, field)
        _check_readers(made, begun, f"{field}.path: got {folder} with embeddings of captions")
    return made


def _check_learnt(data: DataConfig, tuned: Tuned, field: str) -> None:
    """InputError if other things will be said, or of other captions, than are stored."""
    prefixes = tuple(f"{name}." for name in ENCODERS)
    if any(path.startswith(prefixes) for path in tuned.shapes):
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


def _check_readers(made: LatentCacheInfo, begun: Begun, got: str) -> None:
    """InputError unless the captions were read as the training's encoders would."""
    objective, names = begun.objective, list(begun.encoders)
    files = [begun.parts.tokenizers[TOKENIZERS[name]] for name in names]
    pairs = {
        "text encoders with the digests": (
            made.text_encoders,
            tuple(begun.digests[name] for name in names),
        ),
        "tokenizers with the digests": (made.tokenizers, tuple(map(tokenizer_digest, files))),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise InputError(
                f"{got} by {what} {', '.join(theirs)}, expected {', '.join(ours)} as "
                f"{objective.text_encoder} has"
            )
    pooled = objective.model.addition_embed_type is not None
    if pooled != bool(made.pooled_width):
        theirs, ours = ("with" if x else "without" for x in (made.pooled_width, pooled))
        raise InputError(f"{got} {theirs} pooled text, expected them {ours} as the UNet is told")
