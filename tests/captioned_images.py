"""Small captioned pictures, whole and broken, as each source stores them."""

import io
import json
import pathlib
import tarfile

import msgpack
import numpy as np
import pyarrow
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image


def pixels(number, size=(12, 10)):
    """A smooth ramp from a grey that tells `number`: a JPEG of it is within 3 steps."""
    h, w = size
    ramp = np.linspace(0, 60, h)[:, None] + np.linspace(0, 60, w)
    grey = (8 * (number % 16) + ramp).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def encoded(number, size=(12, 10), form="PNG", **options):
    """An image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(number, size)).save(buffer, form, **options)
    return buffer.getvalue()


def caption(number):
    """What picture `number` shows."""
    return f"the picture number {number}"


def write_folder(folder: pathlib.Path, count, table=False, sizes=((12, 10),)):
    """PNGs, with a metadata.jsonl or a .txt beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        (folder / f"{i:04d}.png").write_bytes(encoded(i, sizes[i % len(sizes)]))
        rows.append({"file_name": f"{i:04d}.png", "text": caption(i)})
        if not table:
            (folder / f"{i:04d}.txt").write_text(caption(i) + "\n")
    if table:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def write_parquet(path: pathlib.Path, numbers, rows=3):
    """A table as Hugging Face writes it, in groups of so many rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encoded(i), "path": f"{i}.png"} for i in numbers]
    table = pyarrow.table({"image": cells, "text": [caption(i) for i in numbers]})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


def add(tar, name, data):
    """A member of a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: pathlib.Path, numbers, form="jpg"):
    """A tar in the order that img2dataset writes: picture, json, txt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            how = {"jpg": {"form": "JPEG"}, "png": {}, "webp": {"form": "WEBP", "lossless": True}}
            add(tar, f"{i:09d}.{form}", encoded(i, **how[form]))
            add(tar, f"{i:09d}.json", json.dumps({"key": f"{i:09d}"}).encode())
            add(tar, f"{i:09d}.txt", caption(i).encode())
    return path


def write_array_record(path: pathlib.Path, numbers):
    """An ArrayRecord file of msgpack maps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i in numbers:
        writer.write(msgpack.packb({"image": encoded(i), "caption": caption(i)}))
    writer.close()
    return path
