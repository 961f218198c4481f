"""Latent caches: images encoded by a VAE once, so that training need not.

With text encoders, the embeddings of the captions are stored too.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.jsonfiles import write_object
from jaxdiff.checkpoints.pipelines import INDEX
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, Int, NDArray, dtype_of
from jaxdiff.core.validate import in_range, one_of, positive
from jaxdiff.data.bad_samples import BadSampleCounter, BadSampleError
from jaxdiff.data.batches import Item, normalize_images
from jaxdiff.data.buckets import Size
from jaxdiff.data.latent_records import pack_record, sharded
from jaxdiff.data.latents import DESCRIPTION, NULL_CAPTION_FILE, LatentCacheInfo, read_description
from jaxdiff.data.samples import Make, make_transform
from jaxdiff.data.sampling_order import SamplePosition
from jaxdiff.data.sources.records import write_records
from jaxdiff.data.sources.storage import fingerprint
from jaxdiff.experiments.cache_texts import (
    EncodeText,
    TextEncoders,
    load_text_encoders,
    make_text_encoder,
    null_record,
)
from jaxdiff.experiments.datasets import (
    Groups,
    bucket_items,
    check_usable_items,
    open_image_source,
)
from jaxdiff.experiments.procedural import image_side, procedural_dataset
from jaxdiff.families.detection import family_of_folder
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.latent_codec import LatentCodec
from jaxdiff.models.vae import LOGVAR_RANGE
from jaxdiff.parallel.mesh import check_batch_size, data_mesh, replicate, shard_batch
from jaxdiff.training.config import IMAGE_KINDS, PROCEDURAL_KINDS, DataConfig

Encode = Callable[[Float[NDArray, "b h w c"]], tuple[NDArray, NDArray]]


class CacheSummary(NamedTuple):
    """What a cache has after a run."""

    shards: list[pathlib.Path]  # those that exist
    num_shards: int  # of the whole cache
    skipped: dict[str, int]  # bad samples by reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentCaching:
    """What is encoded into the folder `output`, and how; see `jaxdiff cache-latents`.

    `process_index` says which part of the shards to write.
    """

    vae: pathlib.Path  # a diffusers folder with vae/, or the folder of a VAE
    output: pathlib.Path
    data: DataConfig
    text_encoders: pathlib.Path | None = None  # whose embeddings of the captions are stored too
    dtype: str = "float16"  # of the stored arrays
    compute_dtype: str = "float32"
    batch_size: int = 8
    shard_size: int = 1024  # images per file
    min_bucket_size: int = 256
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        one_of("kind", self.data.kind, (*PROCEDURAL_KINDS, *IMAGE_KINDS))
        for name in ("batch_size", "shard_size", "min_bucket_size", "process_count"):
            positive(name, getattr(self, name))
        in_range("process_index", self.process_index, 0, self.process_count - 1)

    def run(self, report: Callable[[str], None]) -> CacheSummary:
        """Write the missing shards; `report` gets a line for each. Raises InputError."""
        mesh = data_mesh(jax.local_devices())
        check_batch_size(self.batch_size, mesh)
        skipped = BadSampleCounter(self.data.max_bad_fraction)
        groups, data_fingerprint, make_of = self._open_data(skipped)
        check_usable_items(self.data, [items for _, items in groups], skipped)
        if self.data.max_aspect_ratio > 1:
            report("; ".join(f"{len(items)} images of {w}x{h}" for (h, w), items in groups))
        shards = sharded(groups, self.shard_size)
        make = make_of([size for size, _ in shards])
        self._check_readable(shards, make)
        folder = codec_folder(self.vae)
        compute = dtype_of(self.compute_dtype)
        vae = cast(LatentCodec, read_component(folder, dtype=compute).module)
        if self.data.kind in PROCEDURAL_KINDS:
            image_side(self.data, vae.config.downscale)
        text_encoders, encode_text = None, None
        if self.text_encoders is not None:
            text_encoders = load_text_encoders(self.text_encoders, compute)
            encode_text = make_text_encoder(text_encoders, self.batch_size, mesh)
        vae_digest = digest(find_weights(folder))
        info = self._info(vae, vae_digest, shards, data_fingerprint, text_encoders)
        _write_info(self.output, info)
        if encode_text is not None and self.process_index == 0:
            null = functools.partial(null_record, encode_text, self.dtype)
            _write(self.output / NULL_CAPTION_FILE, lambda: [null()], report)
        encode = _encoder(vae, self.batch_size, mesh)
        for number in range(self.process_index, len(shards), self.process_count):
            items = _positions(number, shards[number][1])
            work = functools.partial(self._records, items, make, encode, encode_text, skipped)
            _write(self.output / info.shard(number), work, report)
        paths = [self.output / info.shard(i) for i in range(len(info.items))]
        written = [path for path in paths if path.exists()]
        return CacheSummary(written, len(paths), skipped.counts())

    def _open_data(
        self, skipped: BadSampleCounter
    ) -> tuple[Groups, str, Callable[[list[Size]], Make]]:
        """The items of each size, their fingerprint, and a function that makes the transform."""
        data = self.data
        if data.kind in PROCEDURAL_KINDS:
            if data.num_scenes is None:
                raise InputError(
                    "num_scenes: got none, expected the number of scenes to encode (--num-scenes)"
                )
            count, side = positive("num_scenes", data.num_scenes), image_side(data)
            data_fingerprint = fingerprint(
                data.kind, str(data.seed), str(data.variations), str(count), str(side)
            )
            make = procedural_dataset(data.kind).make_items(data)
            return [((side, side), np.arange(count))], data_fingerprint, lambda sizes: make
        source = open_image_source(data, skipped, captions=data.caption is None)
        groups, data_fingerprint = bucket_items(data, source, self.min_bucket_size)
        choices = {"seed": data.seed, "crop": data.crop, "flip": data.flip}
        return groups, data_fingerprint, lambda sizes: make_transform(source, sizes, **choices)

    def _check_readable(self, shards: Sequence[tuple[Size, Any]], make: Make) -> None:
        """InputError, before anything is written, if no item can be read."""
        tried = BadSampleCounter(self.data.max_bad_fraction)
        positions = (each for n, (_, items) in enumerate(shards) for each in _positions(n, items))
        if all(_prepare(make, None, tried, each) is None for each in positions):
            check_usable_items(self.data, [], tried)

    def _info(
        self,
        vae: LatentCodec,
        vae_digest: str,
        shards: Sequence[tuple[Size, Any]],
        data_fingerprint: str,
        text_encoders: TextEncoders | None,
    ) -> LatentCacheInfo:
        """The content of latents.json."""
        data = self.data
        prepared = (data.seed, data.crop, data.flip, self.compute_dtype)
        caption = () if data.caption is None else (data.caption,)
        return LatentCacheInfo(
            vae=vae_digest,
            source=fingerprint(data_fingerprint, repr(prepared), *caption),
            resolution=shards[0][0][0] if data.kind in PROCEDURAL_KINDS else data.resolution or 0,
            downscale=vae.config.downscale,
            channels=vae.config.latent_channels,
            dtype=self.dtype,
            heights=tuple(size[0] for size, _ in shards),
            widths=tuple(size[1] for size, _ in shards),
            items=tuple(len(items) for _, items in shards),
            **({} if text_encoders is None else text_encoders.cache_info()),
        )

    def _records(
        self,
        items: Sequence[tuple[int, SamplePosition]],
        make: Make,
        encode: Encode,
        encode_text: EncodeText | None,
        skipped: BadSampleCounter,
    ) -> Iterator[dict[str, Any]]:
        """The records of the readable items; prepares the next batch while it encodes one."""
        size = self.batch_size
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        prepare = functools.partial(_prepare, make, self.data.caption, skipped)
        with ThreadPoolExecutor(max(1, self.data.threads)) as pool:
            ahead = list(pool.map(prepare, parts[0]))
            for i in range(len(parts)):
                batch = [item for item in ahead if item is not None]
                coming = pool.map(prepare, parts[i + 1] if i + 1 < len(parts) else [])
                if batch:
                    images = normalize_images(np.stack([item["image"] for item in batch]))
                    mean, logvar = encode(images)
                    captions = [item["caption"] for item in batch]
                    texts = {} if encode_text is None else encode_text(captions)
                    for row, item in enumerate(batch):
                        own = {name: array[row] for name, array in texts.items()}
                        yield pack_record(item, mean[row], logvar[row], self.dtype, own)
                ahead = list(coming)


def _positions(shard: int, items: Int[NDArray, "_"]) -> list[tuple[int, SamplePosition]]:
    """The items of a shard and what their crops and flips are drawn from."""
    return [(int(i), SamplePosition(0, shard, int(i))) for i in items]


def codec_folder(source: pathlib.Path) -> pathlib.Path:
    """The folder of the codec in `source`; InputError for a model that works on pixels."""
    if not (source / INDEX).is_file():
        return source / "vae" if (source / "vae").is_dir() else source
    family = family_of_folder(source)
    if family.latent_codec is None:
        raise InputError(
            f"vae: got {source}, a model of {family.name}, which works on pixels, expected a "
            "model with latents to cache"
        )
    return source / family.latent_codec


def _write(
    path: pathlib.Path,
    records: Callable[[], Iterable[dict[str, Any]]],
    report: Callable[[str], None],
) -> None:
    """Write a file of records unless it exists."""
    for part in path.parent.glob(f".{path.name}.*.part"):  # left by a killed process
        part.unlink()
    if not path.exists():
        count = write_records(path, records())
        report(f"{path.name}: {count} records")


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


def _encoder(vae: Any, batch_size: int, mesh: Any) -> Encode:
    """A function that encodes up to `batch_size` images; compiles once for each size."""
    params = replicate(param_dict(vae), mesh)
    program = jax.jit(lambda params, images: with_params(vae, params).encode(images))

    def encode(images: Float[NDArray, "b h w c"]) -> tuple[NDArray, NDArray]:
        padded = np.zeros((batch_size, *images.shape[1:]), np.float32)
        padded[: len(images)] = images
        mean, logvar = jax.device_get(program(params, shard_batch({"i": padded}, mesh)["i"]))
        if logvar is None:  # one latent, without variance
            logvar = np.full_like(mean, LOGVAR_RANGE[0])
        return mean[: len(images)], logvar[: len(images)]

    return encode


def _prepare(
    make: Make, caption: str | None, skipped: BadSampleCounter, item: tuple[int, SamplePosition]
) -> Item | None:
    """A prepared item, with the caption `caption` if that is set; None for a bad sample."""
    skipped.seen()
    try:
        made = make(*item)
        return made if caption is None else {**made, "caption": caption}
    except BadSampleError as error:
        skipped.broken(str(error), where=error.where)
        return None
