"""How fast stored images become batches, for each source and number of threads.

    PYTHONPATH=. python benchmarks/data.py [--side 512] [--resolution 512] [--threads 1 2]

Writes JPEGs of SIDE x 4/3 SIDE pixels as a folder, tars, ArrayRecord, Parquet and latents where
there are none, then reads them from the page cache: whole batches of cropped, flipped images as
training gets them, without tokens. Prints images per second, the best of three runs each. Latents
are of the size that a VAE with 8 pixels and 4 channels per latent makes of the resolution.
"""

import argparse
import io
import json
import os
import pathlib
import tarfile
import time
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from jaxdiff.data.batches import batches
from jaxdiff.data.latent_records import pack_record
from jaxdiff.data.latents import DESCRIPTION, LatentCacheInfo
from jaxdiff.data.sources.records import write_records
from jaxdiff.experiments.datasets import open_dataset
from jaxdiff.training.config import IMAGE_KINDS, DataConfig

IMAGE_COUNT = 512
RUNS = 3
ROWS = 100  # of a Parquet row group
DOWNSCALE, CHANNELS = 8, 4
QUALITY = 90  # about what images on the web are stored in
OCTAVES, FALL = 9, 0.6  # scales of an image's structure, and how each is weaker than the coarser


def jpeg(number: int, side: int) -> bytes:
    """An image with structure at all scales, so that it compresses as photographs do."""
    rng = np.random.default_rng(number)
    size = (4 * side // 3, side)
    total = np.zeros((side, size[0], 3), np.float32)
    for octave in range(OCTAVES):
        cells = rng.random((2 + 2**octave, 2 + 2**octave, 3)) * 255
        layer = Image.fromarray(cells.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        total += np.asarray(layer, np.float32) * (1 - FALL) * FALL**octave
    buffer = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write(folder: pathlib.Path, side: int, resolution: int) -> None:
    """The same images for each source."""
    images = [jpeg(i, side) for i in range(IMAGE_COUNT)]
    records = [{"image": data, "caption": f"image {i} of many"} for i, data in enumerate(images)]
    for kind in ("folder", "tars"):
        (folder / kind).mkdir(parents=True)
    rows = []
    with tarfile.open(folder / "tars" / "00000.tar", "w") as tar:
        for i, record in enumerate(records):
            (folder / "folder" / f"{i:05d}.jpg").write_bytes(record["image"])
            rows.append(json.dumps({"file_name": f"{i:05d}.jpg", "text": record["caption"]}))
            for extension, data in (
                ("jpg", record["image"]),
                ("txt", record["caption"].encode()),
            ):
                info = tarfile.TarInfo(f"{i:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (folder / "folder" / "metadata.jsonl").write_text("\n".join(rows))
    write_records(folder / "records" / "0.array_record", records)
    (folder / "parquet").mkdir()
    cells = [{"bytes": record["image"], "path": None} for record in records]
    table = pyarrow.table({"image": cells, "text": [record["caption"] for record in records]})
    pyarrow.parquet.write_table(table, folder / "parquet" / "0.parquet", row_group_size=ROWS)
    write_latents(folder / "latents", resolution)
    print(f"{np.mean([len(data) for data in images]) / 1e3:.0f} kB per image")


def write_latents(folder: pathlib.Path, resolution: int) -> None:
    """Random latents, as cache-latents lays them out."""
    described = LatentCacheInfo(
        vae="none",
        source="none",
        resolution=resolution,
        downscale=DOWNSCALE,
        channels=CHANNELS,
        dtype="float16",
        heights=(resolution,),
        widths=(resolution,),
        items=(IMAGE_COUNT,),
    )
    rng = np.random.default_rng(0)
    record = {"caption": "an image of many", "time_ids": np.zeros(6, np.int32)}
    shape = described.shape(0)
    write_records(
        folder / described.shard(0),
        (
            pack_record(record, rng.normal(size=shape), rng.normal(size=shape), described.dtype)
            for _ in range(IMAGE_COUNT)
        ),
    )
    (folder / DESCRIPTION).write_text(json.dumps(vars(described)))


def rate(config: DataConfig, batch_size: int) -> float:
    """Images per second of the fastest run, the first batches not counted."""
    source = open_dataset(config, batch_size).training
    iterator = batches(source, batch_size=batch_size, threads=config.threads)
    for _ in range(2 + config.threads):
        next(iterator)
    count = IMAGE_COUNT // batch_size
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(count):
            next(iterator)
        seconds.append(time.perf_counter() - start)
    iterator.close()
    return count * batch_size / min(seconds)


def main() -> None:
    """Write, read, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/jaxdiff-data"))
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    folder = options.folder / f"{options.side}-{options.resolution}"
    if not folder.exists():
        write(folder, options.side, options.resolution)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the first run")
    for kind in ("folder", "tars", "records", "parquet", "latents"):
        for threads in options.threads:
            prepared: dict[str, Any] = {
                "resolution": options.resolution,
                "crop": "random",
                "flip": True,
                "cache": str(folder / "cache"),
            }
            config = DataConfig(
                kind=kind,
                path=str(folder / kind),
                threads=threads,
                **(prepared if kind in IMAGE_KINDS else {}),
            )
            found = rate(config, options.batch_size)
            print(f"{kind:8s} {threads} threads  {found:6.0f} images/s")


if __name__ == "__main__":
    main()
