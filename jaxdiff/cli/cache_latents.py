"""`jaxdiff cache-latents`: encode images with a VAE once, so that training need not.

`--texts embeddings` encodes the captions with the text encoders too.
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
from jaxdiff.cli.cache_texts import (
    EncodeText,
    TextEncoders,
    load_text_encoders,
    make_text_encoder,
    null_record,
)
from jaxdiff.core.aliases import rename_options
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
from jaxdiff.training.config.aliases import new_option

# The data options have no prefix: --kind folder --path FOLDER --resolution 512.
Fields = Annotated[DataConfig, tyro.conf.arg(name="")]
TEXTS = ("captions", "embeddings")
Encode = Callable[[Float[NDArray, "b h w c"]], tuple[NDArray, NDArray]]


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


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, encode, write. Raises InputError on bad input."""
    arguments = rename_options(arguments, functools.partial(new_option, section="data"))
    options = tyro.cli(Options, args=arguments, prog="jaxdiff cache-latents")
    one_of("kind", options.data.kind, ("scenes", *IMAGE_KINDS))
    one_of("texts", options.texts, TEXTS)
    if options.text_encoder is not None and options.texts == "captions":
        raise InputError(
            f"text_encoder: got {options.text_encoder} with texts captions, expected texts "
            "embeddings (--texts embeddings)"
        )
    for name in ("batch_size", "shard_size", "min_bucket_size"):
        positive(name, getattr(options, name))
    index, count = _process_share(options)
    mesh = data_mesh(jax.local_devices())
    check_batch_size(options.batch_size, mesh)
    cache.enable()
    skipped = BadSampleCounter(options.data.max_bad_fraction)
    groups, data_fingerprint, make_of = _open_data(options, skipped)
    shards = sharded(groups, options.shard_size)
    folder = options.vae / "vae" if (options.vae / "vae").is_dir() else options.vae
    vae = cast(AutoencoderKL, read_component(folder, dtype=dtype_of(options.compute_dtype)).module)
    if options.data.kind == "scenes":
        scene_side(options.data, vae.config.downscale)
    text_encoders, encode_text = None, None
    if options.texts == "embeddings":
        text_encoders = load_text_encoders(
            options.text_encoder or options.vae, dtype_of(options.compute_dtype)
        )
        encode_text = make_text_encoder(text_encoders, options.batch_size, mesh)
    info = _cache_info(
        options, vae, digest(find_weights(folder)), shards, data_fingerprint, text_encoders
    )
    _write_info(options.output, info)
    if encode_text is not None and index == 0:
        _write(
            options.output / NULL_CAPTION_FILE, lambda: [null_record(encode_text, options.dtype)]
        )
    make = make_of([size for size, _ in shards])
    encode = _encoder(vae, options.batch_size, mesh)
    for number in range(index, len(shards), count):
        items = [(int(i), SamplePosition(0, number, int(i))) for i in shards[number][1]]
        work = functools.partial(_records, options, items, make, encode, encode_text, skipped)
        _write(options.output / info.shard(number), work)
    _print_summary(options.output, info, skipped)


def _open_data(
    options: Options, skipped: BadSampleCounter
) -> tuple[Groups, str, Callable[[list[Size]], Make]]:
    """The items of each size, their fingerprint, and a function that makes the transform."""
    data = options.data
    if data.kind == "scenes":
        if data.num_scenes is None:
            raise InputError(
                "num_scenes: got none, expected the number of scenes to encode (--num-scenes)"
            )
        count, side = positive("num_scenes", data.num_scenes), scene_side(data)
        data_fingerprint = fingerprint(
            "scenes", str(data.seed), str(data.variations), str(count), str(side)
        )
        return (
            [((side, side), np.arange(count))],
            data_fingerprint,
            lambda sizes: scene_maker(scene_source(data)),
        )
    source = open_image_source(data, skipped, captions=data.caption is None)
    groups, data_fingerprint = bucket_items(data, source, options.min_bucket_size)
    choices = {"seed": data.seed, "crop": data.crop, "flip": data.flip}
    return groups, data_fingerprint, lambda sizes: make_transform(source, sizes, **choices)


def _write(path: pathlib.Path, records: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """Write a file of records unless it exists."""
    for part in path.parent.glob(f".{path.name}.*.part"):  # left by a killed process
        part.unlink()
    if not path.exists():
        count = write_records(path, records())
        print(f"cache-latents: {path.name}: {count} records", file=sys.stderr)


def _process_share(options: Options) -> tuple[int, int]:
    """The index of this process and the number of processes."""
    if (options.process_index is None) != (options.process_count is None):
        raise InputError(
            "process_index: got only one of process_index and process_count, expected both or none"
        )
    if options.process_index is None or options.process_count is None:
        return jax.process_index(), jax.process_count()
    positive("process_count", options.process_count)
    in_range("process_index", options.process_index, 0, options.process_count - 1)
    return options.process_index, options.process_count


def _cache_info(
    options: Options,
    vae: AutoencoderKL,
    vae_digest: str,
    shards: Sequence[tuple[Size, Any]],
    data_fingerprint: str,
    text_encoders: TextEncoders | None,
) -> LatentCacheInfo:
    """The content of latents.json."""
    data = options.data
    prepared = (data.seed, data.crop, data.flip, options.compute_dtype)
    caption = () if data.caption is None else (data.caption,)
    return LatentCacheInfo(
        vae=vae_digest,
        source=fingerprint(data_fingerprint, repr(prepared), *caption),
        resolution=shards[0][0][0] if data.kind == "scenes" else data.resolution or 0,
        downscale=vae.config.downscale,
        channels=vae.config.latent_channels,
        dtype=options.dtype,
        heights=tuple(size[0] for size, _ in shards),
        widths=tuple(size[1] for size, _ in shards),
        items=tuple(len(items) for _, items in shards),
        **({} if text_encoders is None else text_encoders.cache_info()),
    )


def _write_info(folder: pathlib.Path, info: LatentCacheInfo) -> None:
    """Write latents.json; InputError if the folder has other latents."""
    if (folder / DESCRIPTION).exists():
        found, expected = (dataclasses.asdict(d) for d in (read_description(folder), info))
        for name, value in expected.items():
            if found[name] != value:
                raise InputError(
                    f"output: got {folder} with latents of {name} {found[name]!r:.80}, "
                    f"expected {name} {value!r:.80} or a new folder"
                )
        return
    with atomic_file(folder / DESCRIPTION) as temporary:
        write_object(temporary, json.loads(json.dumps(dataclasses.asdict(info))))


def _encoder(vae: AutoencoderKL, batch_size: int, mesh: Any) -> Encode:
    """A function that encodes up to `batch_size` images; compiles once for each size."""
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
    encode_text: EncodeText | None,
    skipped: BadSampleCounter,
) -> Iterator[dict[str, Any]]:
    """The records of the readable items; prepares the next batch while it encodes one."""
    size = options.batch_size
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    prepare = functools.partial(_prepare, make, options.data.caption, skipped)
    with ThreadPoolExecutor(max(1, options.data.threads)) as pool:
        ahead = list(pool.map(prepare, parts[0]))
        for i in range(len(parts)):
            batch = [item for item in ahead if item is not None]
            coming = pool.map(prepare, parts[i + 1] if i + 1 < len(parts) else [])
            if batch:
                mean, logvar = encode(normalize_images(np.stack([item["image"] for item in batch])))
                texts = (
                    encode_text([item["caption"] for item in batch])
                    if encode_text is not None
                    else {}
                )
                for row, item in enumerate(batch):
                    own = {name: array[row] for name, array in texts.items()}
                    yield pack_record(item, mean[row], logvar[row], options.dtype, own)
            ahead = list(coming)


def _prepare(
    make: Make, caption: str | None, skipped: BadSampleCounter, item: tuple[int, SamplePosition]
) -> Item | None:
    """A prepared item, with the caption `caption` if that is set; None for a bad sample."""
    skipped.seen()
    try:
        made = make(*item)
        return made if caption is None else {**made, "caption": caption}
    except BadSampleError as error:
        skipped.broken(str(error))
        return None


def _print_summary(folder: pathlib.Path, info: LatentCacheInfo, skipped: BadSampleCounter) -> None:
    """Print the number of shards in the folder."""
    count = len(info.items)
    written = [path for i in range(count) if (path := folder / info.shard(i)).exists()]
    size = sum(path.stat().st_size for path in written)
    skips = ", ".join(f"{n} {reason}" for reason, n in skipped.counts().items())
    skips = f"; skipped: {skips}" if skips else ""
    print(f"{folder}: {len(written)} of {count} shards, {size / 1e6:.1f} MB{skips}")
