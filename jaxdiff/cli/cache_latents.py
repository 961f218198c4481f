"""`jaxdiff cache-latents`: encode images with a VAE once, so that training need not.

`--texts embeddings` encodes the captions with the text encoders too.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import jax
import tyro

from jaxdiff.cli.arguments import parse
from jaxdiff.core.aliases import rename_options
from jaxdiff.core.configs import Need, check_needs
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.experiments.cache_latents import LatentCaching
from jaxdiff.pipeline import cache
from jaxdiff.training.config import DataConfig
from jaxdiff.training.config.aliases import new_option

# The data options have no prefix: --kind folder --path FOLDER --resolution 512.
Fields = Annotated[DataConfig, tyro.conf.arg(name="")]
TEXTS = ("captions", "embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Encode captioned images with a VAE into shards, for training with `data.kind latents`.

    The same command again writes the missing shards. Several processes share the work: those of a
    JAX cluster automatically, others with --process-index and --process-count.
    """

    vae: tyro.conf.Positional[pathlib.Path]
    """A diffusers folder with vae/, or the folder of a VAE."""
    output: tyro.conf.Positional[pathlib.Path]
    """Output folder."""
    data: Fields = dataclasses.field(default_factory=DataConfig)
    texts: str = "captions"
    """Store captions only (captions), or also their text embeddings (embeddings), so that training
    the UNet alone need not run the text encoders."""
    text_encoder: pathlib.Path | None = None
    """A folder with text_encoder/ and tokenizer/, if the positional folder has none."""
    dtype: str = "float16"
    """Dtype of the stored arrays: float16, bfloat16 or float32."""
    compute_dtype: str = "float32"
    """Dtype in which the VAE and the text encoders compute."""
    batch_size: int = 8
    """Images per batch."""
    shard_size: int = 1024
    """Images per file."""
    min_bucket_size: int = 256
    """Buckets with fewer images are merged into neighbouring buckets."""
    process_index: int | None = None
    """Which part of the shards to write, from 0."""
    process_count: int | None = None
    """Number of parts."""


NEEDS = {
    "text_encoder": Need("texts", ("embeddings",)),
    "process_index": Need("process_count"),
}


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, encode, write. Raises InputError on bad input."""
    arguments = rename_options(arguments, functools.partial(new_option, section="data"))
    options = parse(Options, arguments, prog="jaxdiff cache-latents")
    one_of("texts", options.texts, TEXTS)
    check_needs(options, NEEDS)
    for name, path in (("vae", options.vae), ("text_encoder", options.text_encoder)):
        if path is not None and path.is_file():
            raise InputError(
                f"{name}: got the file {path}, expected a folder, as jaxdiff convert makes of it"
            )
    encoders = options.text_encoder or options.vae
    index, count = _process_index_and_count(options)
    caching = LatentCaching(
        vae=options.vae,
        output=options.output,
        data=options.data,
        text_encoders=encoders if options.texts == "embeddings" else None,
        dtype=options.dtype,
        compute_dtype=options.compute_dtype,
        batch_size=options.batch_size,
        shard_size=options.shard_size,
        min_bucket_size=options.min_bucket_size,
        process_index=index,
        process_count=count,
    )
    cache.enable()
    found = caching.run(lambda line: print(f"cache-latents: {line}", file=sys.stderr))
    size = sum(path.stat().st_size for path in found.shards)
    skips = ", ".join(f"{n} {reason}" for reason, n in found.skipped.items())
    print(
        f"{options.output}: {len(found.shards)} of {found.num_shards} shards, {size / 1e6:.1f} MB"
        + (f"; skipped: {skips}" if skips else "")
    )


def _process_index_and_count(options: Options) -> tuple[int, int]:
    """The index of this process and the number of processes."""
    if options.process_count is not None and options.process_index is None:
        raise InputError(
            f"process_count: got {options.process_count} without process_index, expected both"
        )
    if options.process_index is None or options.process_count is None:
        return jax.process_index(), jax.process_count()
    return options.process_index, options.process_count
