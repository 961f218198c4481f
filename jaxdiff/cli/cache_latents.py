"""`jaxdiff cache-latents`: pictures through a VAE once, so that training need not encode them.

With `--texts embeddings` their captions go through the text encoders too.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, cast

import jax
import numpy as np
import tyro

from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.jsonfiles import write_object
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.cli.cache_texts import Readers, Say, null_record, read_readers, sayer
from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray, dtype_of
from jaxdiff.core.validate import in_range, one_of, positive
from jaxdiff.data.bad_samples import BadSampleCounter, BadSampleError
from jaxdiff.data.batches import Item, normalize_images
from jaxdiff.data.buckets import Size
from jaxdiff.data.latents import (
    DESCRIPTION,
    NULL_CAPTION_FILE,
    LatentCacheInfo,
    pack_record,
    read_description,
    sharded,
)
from jaxdiff.data.samples import Make, make_transform
from jaxdiff.data.sampling_order import SamplePosition
from jaxdiff.data.sources.records import write_records
from jaxdiff.data.sources.storage import fingerprint
from jaxdiff.experiments.datasets import Groups, bucket_items, open_image_source
from jaxdiff.experiments.experiment import scene_side, scene_source
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.parallel.mesh import check_batch_size, data_mesh, replicate, shard_batch
from jaxdiff.pipeline import cache
from jaxdiff.scenes.source import scene_maker
from jaxdiff.training.config import IMAGE_KINDS, DataConfig
from jaxdiff.training.config.aliases import new_arguments

# The fields of the data get no prefix: --kind folder --path FOLDER --resolution 512.
Fields = Annotated[DataConfig, tyro.conf.arg(name="")]
TEXTS = ("captions", "embeddings")
Encode = Callable[[Float[NDArray, "b h w c"]], tuple[NDArray, NDArray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Encode captioned pictures with a VAE into shards that `data.kind latents` trains from.

    The same command again makes the shards that are missing. Several processes share the work,
    those of a JAX cluster by themselves, others by --process-index and --process-count.
    """

    vae: tyro.conf.Positional[pathlib.Path]
    """A diffusers folder with a vae/ in it, or the folder of a VAE."""
    output: tyro.conf.Positional[pathlib.Path]
    """The folder to write."""
    data: Fields = dataclasses.field(default_factory=DataConfig)
    texts: str = "captions"
    """What is stored of the captions: captions (as they are) or embeddings (beside them what the
    text encoders say, so that a training of the UNet alone need not run these)."""
    text_encoder: pathlib.Path | None = None
    """A folder with text_encoder/ and tokenizer/, where the positional folder has none."""
    dtype: str = "float16"
    """Of the stored arrays: float16, bfloat16 or float32."""
    compute: str = "float32"
    """In which the VAE and the text encoders compute."""
    batch_size: int = 8
    """Pictures that are encoded at a time."""
    shard_size: int = 1024
    """Pictures in a file."""
    smallest: int = 256
    """Buckets with fewer pictures give them to their neighbours."""
    process_index: int | None = None
    """Which part of the shards to make."""
    process_count: int | None = None
    """How many parts there are."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, encode, write. Raises InputError on bad input."""
    options = tyro.cli(Options, args=new_arguments(arguments, "data"), prog="jaxdiff cache-latents")
    one_of("kind", options.data.kind, ("scenes", *IMAGE_KINDS))
    one_of("texts", options.texts, TEXTS)
    if options.text_encoder is not None and options.texts == "captions":
        raise InputError(
            f"text_encoder: got {options.text_encoder}, expected it left out with texts captions"
        )
    for name in ("batch_size", "shard_size", "smallest"):
        positive(name, getattr(options, name))
    index, count = _share(options)
    mesh = data_mesh(jax.local_devices())
    check_batch_size(options.batch_size, mesh)
    cache.enable()
    skipped = BadSampleCounter(options.data.max_bad_fraction)
    groups, mark, make_of = _opened(options, skipped)
    shards = sharded(groups, options.shard_size)
    folder = options.vae / "vae" if (options.vae / "vae").is_dir() else options.vae
    vae = cast(AutoencoderKL, read_component(folder, dtype=dtype_of(options.compute)).module)
    if options.data.kind == "scenes":
        scene_side(options.data, vae.config.downscale)
    readers, say = None, None
    if options.texts == "embeddings":
        readers = read_readers(options.text_encoder or options.vae, dtype_of(options.compute))
        say = sayer(readers, options.batch_size, mesh)
    described = _described(options, vae, digest(find_weights(folder)), shards, mark, readers)
    _describe(options.output, described)
    if say is not None and index == 0:
        _write(options.output / NULL_CAPTION_FILE, lambda: [null_record(say, options.dtype)])
    make = make_of([size for size, _ in shards])
    encode = _encoder(vae, options.batch_size, mesh)
    for number in range(index, len(shards), count):
        items = [(int(i), SamplePosition(0, number, int(i))) for i in shards[number][1]]
        work = functools.partial(_records, options, items, make, encode, say, skipped)
        _write(options.output / described.shard(number), work)
    _report(options.output, described, skipped)


def _opened(
    options: Options, skipped: BadSampleCounter
) -> tuple[Groups, str, Callable[[list[Size]], Make]]:
    """The items of each size, a fingerprint of them, and what prepares those of each shard."""
    data = options.data
    if data.kind == "scenes":
        if data.num_scenes is None:
            raise InputError(
                "num_scenes: got none, expected how many scenes to encode (--num-scenes)"
            )
        count, side = positive("num_scenes", data.num_scenes), scene_side(data)
        mark = fingerprint("scenes", str(data.seed), str(data.variations), str(count), str(side))
        return (
            [((side, side), np.arange(count))],
            mark,
            lambda sizes: scene_maker(scene_source(data)),
        )
    source = open_image_source(data, skipped, captions=data.caption is None)
    groups, mark = bucket_items(data, source, options.smallest)
    choices = {"seed": data.seed, "crop": data.crop, "flip": data.flip}
    return groups, mark, lambda sizes: make_transform(source, sizes, **choices)


def _write(path: pathlib.Path, records: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """Write a file of records unless it is there."""
    for left in path.parent.glob(f".{path.name}.*.part"):  # of a process that was killed
        left.unlink()
    if not path.exists():
        made = write_records(path, records())
        print(f"cache-latents: {path.name}: {made} records", file=sys.stderr)


def _share(options: Options) -> tuple[int, int]:
    """Which process this is, and of how many."""
    if (options.process_index is None) != (options.process_count is None):
        raise InputError("process_index: got it or process_count alone, expected both or none")
    if options.process_index is None or options.process_count is None:
        return jax.process_index(), jax.process_count()
    positive("process_count", options.process_count)
    in_range("process_index", options.process_index, 0, options.process_count - 1)
    return options.process_index, options.process_count


def _described(
    options: Options,
    vae: AutoencoderKL,
    made_by: str,
    shards: Sequence[tuple[Size, Any]],
    mark: str,
    readers: Readers | None,
) -> LatentCacheInfo:
    """What latents.json shall say."""
    data = options.data
    prepared = (data.seed, data.crop, data.flip, options.compute)
    told = () if data.caption is None else (data.caption,)
    return LatentCacheInfo(
        vae=made_by,
        source=fingerprint(mark, repr(prepared), *told),
        resolution=shards[0][0][0] if data.kind == "scenes" else data.resolution or 0,
        downscale=vae.config.downscale,
        channels=vae.config.latent_channels,
        dtype=options.dtype,
        heights=tuple(size[0] for size, _ in shards),
        widths=tuple(size[1] for size, _ in shards),
        items=tuple(len(items) for _, items in shards),
        **({} if readers is None else readers.described()),
    )


def _describe(folder: pathlib.Path, wanted: LatentCacheInfo) -> None:
    """Write latents.json; InputError if the folder has the latents of something else."""
    if (folder / DESCRIPTION).exists():
        found, asked = (dataclasses.asdict(d) for d in (read_description(folder), wanted))
        for name, value in asked.items():
            if found[name] != value:
                raise InputError(
                    f"output: got {folder} with latents of another {name}, {found[name]!r:.80}, "
                    f"expected {value!r:.80} or a new folder"
                )
        return
    with atomic_file(folder / DESCRIPTION) as temporary:
        write_object(temporary, json.loads(json.dumps(dataclasses.asdict(wanted))))


def _encoder(vae: AutoencoderKL, batch_size: int, mesh: Any) -> Encode:
    """Mean and log-variance of up to `batch_size` pictures; compiles once for each size."""
    params = replicate(param_dict(vae), mesh)
    program = jax.jit(lambda params, images: with_params(vae, params).encode(images))

    def encode(images: Float[NDArray, "b h w c"]) -> tuple[NDArray, NDArray]:
        padded = np.zeros((batch_size, *images.shape[1:]), np.float32)
        padded[: len(images)] = images
        mean, logvar = jax.device_get(program(params, shard_batch({"i": padded}, mesh)["i"]))
        return mean[: len(images)], logvar[: len(images)]

    return encode


def _records(
    options: Options,
    items: Sequence[tuple[int, SamplePosition]],
    make: Make,
    encode: Encode,
    say: Say | None,
    skipped: BadSampleCounter,
) -> Iterator[dict[str, Any]]:
    """The records of the items that are whole, the next batch prepared while one is encoded."""
    size = options.batch_size
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    prepare = functools.partial(_prepared, make, options.data.caption, skipped)
    with ThreadPoolExecutor(max(1, options.data.threads)) as pool:
        ahead = list(pool.map(prepare, parts[0]))
        for i in range(len(parts)):
            found = [item for item in ahead if item is not None]
            coming = pool.map(prepare, parts[i + 1] if i + 1 < len(parts) else [])
            if found:
                mean, logvar = encode(normalize_images(np.stack([item["image"] for item in found])))
                said = say([item["caption"] for item in found]) if say is not None else {}
                for row, item in enumerate(found):
                    own = {name: array[row] for name, array in said.items()}
                    yield pack_record(item, mean[row], logvar[row], options.dtype, own)
            ahead = list(coming)


def _prepared(
    make: Make, caption: str | None, skipped: BadSampleCounter, item: tuple[int, SamplePosition]
) -> Item | None:
    """A prepared picture, None if it is broken; its caption is `caption` where that is said."""
    skipped.seen()
    try:
        made = make(*item)
        return made if caption is None else {**made, "caption": caption}
    except BadSampleError as error:
        skipped.broken(str(error))
        return None


def _report(folder: pathlib.Path, described: LatentCacheInfo, skipped: BadSampleCounter) -> None:
    """Say what there is now."""
    count = len(described.items)
    there = [path for i in range(count) if (path := folder / described.shard(i)).exists()]
    size = sum(path.stat().st_size for path in there)
    left = ", ".join(f"{n} {reason}" for reason, n in skipped.counts().items())
    left = f", skipped here: {left}" if left else ""
    print(f"{folder}: {len(there)} of {count} shards, {size / 1e6:.1f} MB{left}")
