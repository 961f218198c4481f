"""Sources: the same captioned pictures from folders, tars, ArrayRecord, datasets and buckets."""

import io
import json
import resource
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from captioned_images import (
    add,
    caption,
    encoded,
    pixels,
    write_array_record,
    write_folder,
    write_parquet,
    write_tar,
)
from PIL import Image

from jaxdiff.core.errors import InputError, WriteError
from jaxdiff.data.bad_samples import BadSampleCounter, BadSampleError
from jaxdiff.data.sources import BlockSource
from jaxdiff.data.sources.folder import FolderSource
from jaxdiff.data.sources.hub import HubSource
from jaxdiff.data.sources.parquet import ParquetSource
from jaxdiff.data.sources.records import RecordSource, write_records
from jaxdiff.data.sources.tars import TarSource


def numbers(source):
    """Which pictures a source has, by their pixels, after checking the captions."""
    found = []
    for i in range(len(source)):
        record = source[i]
        with Image.open(io.BytesIO(record["image"])) as picture:
            image = np.asarray(picture.convert("RGB")).astype(int)
        number = int(record["caption"].split()[-1])
        assert record["caption"] == caption(number)
        assert np.abs(image - pixels(number)).max() < 4  # JPEG loses a little
        assert record["image"].startswith(source.head(i, 8)[:8])
        found.append(number)
    return found


@pytest.mark.parametrize("table", [False, True])
def test_a_folder_is_read_by_its_captions(tmp_path, table):
    source = FolderSource(str(write_folder(tmp_path, 4, table)), BadSampleCounter())
    assert numbers(source) == [0, 1, 2, 3]
    assert len(source.head(0, 20)) == 20


def test_subfolders_have_tables_of_their_own(tmp_path):
    write_folder(tmp_path / "b", 2, table=True)
    write_folder(tmp_path / "a", 3, table=True)
    assert numbers(FolderSource(str(tmp_path), BadSampleCounter())) == [0, 1, 2, 0, 1]


def test_another_caption_key_and_no_captions_at_all(tmp_path):
    write_folder(tmp_path, 2, table=True)
    rows = [{"file_name": f"000{i}.png", "prompt": caption(i), "text": "no"} for i in (1, 0)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert numbers(FolderSource(str(tmp_path), BadSampleCounter(), caption_key="prompt")) == [1, 0]
    alone = FolderSource(str(tmp_path), BadSampleCounter(), captions=False)
    assert [alone[i] for i in (0, 1)] == [{"image": encoded(i), "caption": ""} for i in (0, 1)]


def test_what_is_wrong_with_a_table_is_counted_by_reason(tmp_path):
    write_folder(tmp_path / "in", 3, table=True)
    (tmp_path / "secret.png").write_bytes(encoded(9))
    more = [
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "0000.png", "text": " "}',
        '{"file_name": "0000.png", "text": null}',
        '{"file_name": "../secret.png", "text": "x"}',
        '{"text": "x"}',
        "[1]",
        "{",
        "",
    ]
    with (tmp_path / "in" / "metadata.jsonl").open("a") as file:
        file.write("\n".join(more))
    (tmp_path / "in" / "untold.png").write_bytes(encoded(7))
    skipped = BadSampleCounter(0.9)
    assert numbers(FolderSource(str(tmp_path / "in"), skipped)) == [0, 1, 2]
    assert skipped.counts() == {
        "missing file": 1,
        "empty caption": 1,
        "without caption": 2,
        "bad metadata line": 4,
    }


def test_an_empty_caption_file_breaks_its_item_only(tmp_path):
    write_folder(tmp_path, 3)
    (tmp_path / "0001.txt").write_text(" \n")
    (tmp_path / "0002.txt").write_bytes(b"a\ncaf\xe9")
    source = FolderSource(str(tmp_path), BadSampleCounter())
    with pytest.raises(BadSampleError, match="empty caption"):
        source[1]
    with pytest.raises(BadSampleError, match="not UTF-8") as caught:
        source[2]
    assert caught.value.where == f"{tmp_path}/0002.txt:2"
    (tmp_path / "0000.png").unlink()
    with pytest.raises(BadSampleError, match="missing file"):
        source[0]


def write_images(folder, *names):
    """An image for each name, its number the position."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(encoded(number, form="JPEG" if "j" in name.lower() else "PNG"))


def test_captions_are_text_files_or_json_beside_images(tmp_path):
    write_images(tmp_path, "a.png", "B.JPG", "c.jfif", "d.jpeg")
    (tmp_path / "a.caption").write_text(caption(0))
    (tmp_path / "B.TXT").write_text(caption(1))
    (tmp_path / "B.caption").write_text("the picture number 15")
    (tmp_path / "c.json").write_text(json.dumps({"url": "x", "caption": caption(2)}))
    (tmp_path / "d.txt").write_text(caption(3))
    (tmp_path / "d.json").write_text(json.dumps({"caption": "data about it"}))
    with pytest.warns(UserWarning, match="^data.path: ") as said:
        source = FolderSource(str(tmp_path), BadSampleCounter())
    assert [str(each.message).partition(": ")[2] for each in said] == [
        f"{tmp_path}: 1 images have several captions; of B.JPG that in B.TXT counts, not B.caption"
    ]
    assert sorted(numbers(source)) == [0, 1, 2, 3]


def test_a_table_may_be_csv_as_spreadsheets_write_it(tmp_path):
    write_images(tmp_path, "a.png", "b.png", "c.png", "d.png")
    rows = [
        "file_name,text",
        f'a.png,"{caption(0)}"',
        f"b.png,{caption(1)}",
        "c.png,a star, without quotes",
        "d.png",
    ]
    (tmp_path / "metadata.csv").write_bytes("\r\n".join(rows).encode("utf-16"))
    skipped = BadSampleCounter()
    assert numbers(FolderSource(str(tmp_path), skipped)) == [0, 1]
    assert skipped.counts() == {"bad metadata line": 2, "without caption": 2}
    (tmp_path / "metadata.csv").write_text("file;text\na.png;x\n")
    with pytest.raises(InputError, match=r"metadata\.csv: got the columns file;text, expected 'f"):
        FolderSource(str(tmp_path), skipped)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"x\n')
    with pytest.raises(InputError, match=r"metadata\.csv:2: got unexpected end of data, expected"):
        FolderSource(str(tmp_path), skipped)
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(
        InputError, match=r"got metadata\.jsonl and metadata\.csv in .*, expected one"
    ):
        FolderSource(str(tmp_path), skipped)


def test_the_key_of_a_caption_may_be_another_but_not_a_guess(tmp_path):
    write_images(tmp_path, "a.png", "b.png", "c.png")
    rows = [
        {"file_name": "a.png", "caption": [caption(0), "another"]},
        {"file_name": "b.png", "prompt": caption(1)},
        {"file_name": "c.png", "prompt": "x", "caption": "y"},
    ]
    table = tmp_path / "metadata.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    skipped = BadSampleCounter()
    assert numbers(FolderSource(str(tmp_path), skipped)) == [0, 1]
    assert skipped.counts()["captions under several keys (data.caption_key names one)"] == 1
    assert len(FolderSource(str(tmp_path), skipped, caption_key="prompt")) == 2
    table.write_text(json.dumps({"file_name": "a.png", "text": caption(0), "caption": "x"}))
    with pytest.warns(UserWarning, match=r"has caption beside text, which is not read"):
        source = FolderSource(str(tmp_path), skipped)
    assert numbers(source) == [0]


def test_captions_elsewhere_and_files_that_are_not_read_are_said(tmp_path):
    write_folder(tmp_path, 2, table=True)
    for name in ("0000.txt", "0001.caption", "c.heic", "d.HEIC", "notes.txt", "0000.json"):
        (tmp_path / name).write_text("x")
    with pytest.warns(UserWarning, match="^data.path: ") as said:
        source = FolderSource(str(tmp_path), BadSampleCounter())
    assert [str(each.message).partition(f"{tmp_path}: ")[2] for each in said] == [
        "3 files are neither images nor captions of one and are not read (2 .heic, 1 .txt)",
        "2 images have several captions; of 0000.png that in metadata.jsonl counts, not 0000.txt",
    ]
    assert numbers(source) == [0, 1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_captions_of_every_kind_are_read_in_the_encodings_of_windows(tmp_path, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""

    def text(words):
        return (mark + words + "\r\n").encode(encoding)

    write_images(tmp_path / "in", "a.png", "b.png")
    (tmp_path / "in" / "a.txt").write_bytes(text(caption(0)))
    (tmp_path / "in" / "b.caption").write_bytes(text(caption(1)))
    assert numbers(FolderSource(str(tmp_path / "in"), BadSampleCounter())) == [0, 1]
    write_images(tmp_path / "table", "a.png", "b.png")
    rows = [{"file_name": "a.png", "text": caption(0)}, {"file_name": "b.png", "text": caption(1)}]
    (tmp_path / "table" / "metadata.jsonl").write_bytes(text("\r\n".join(map(json.dumps, rows))))
    assert numbers(FolderSource(str(tmp_path / "table"), BadSampleCounter())) == [0, 1]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for number, (kind, words) in enumerate(
            [("txt", caption(0)), ("json", json.dumps({"prompt": caption(1)}))]
        ):
            add(tar, f"{number}.png", encoded(number))
            add(tar, f"{number}.{kind}", text(words))
    source = TarSource(str(tmp_path / "tars"), BadSampleCounter(), cache=tmp_path / "cache")
    assert numbers(source) == [0, 1]


def test_samples_of_a_tar_have_captions_in_text_or_json(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as tar:
        add(tar, "1.PNG", encoded(1))
        add(tar, "1.caption", caption(1).encode())
        add(tar, "2.png", encoded(2))
        add(tar, "2.json", json.dumps({"caption": caption(2), "title": caption(7)}).encode())
        add(tar, "3.png", encoded(3))
        add(tar, "3.json", b'{"caption": null}')
        add(tar, "4.png", encoded(9))
        add(tar, "4.webp", encoded(4))
        add(tar, "4.caption", b"another")
        add(tar, "4.txt", caption(4).encode())
    (tmp_path / "in" / "1.tar.gz").write_bytes(b"")
    cache, skipped = tmp_path / "cache", BadSampleCounter()
    with pytest.warns(UserWarning, match="^data.path: ") as said:
        source = TarSource(str(tmp_path / "in"), skipped, cache=cache)
    assert [str(each.message).partition(f"{tmp_path}/in: ")[2] for each in said] == [
        "1 compressed tars such as 1.tar.gz are not read",
        "1 samples have several captions; KEY.txt counts, not KEY.caption",
        "1 samples have several images; the last counts",
    ]
    assert numbers(source) == [1, 2, 4]
    assert skipped.counts() == {"without caption": 1}
    (tmp_path / "in" / "1.tar.gz").unlink()
    with pytest.warns(UserWarning, match="several"):
        source = TarSource(str(tmp_path / "in"), skipped, cache=cache, caption_key="title")
    assert [source[i]["caption"] for i in range(3)] == [caption(1), caption(7), caption(4)]


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
def test_tars_are_random_access(tmp_path, form):
    for i in range(3):
        write_tar(tmp_path / "in" / f"{i:05d}.tar", range(4 * i, 4 * i + 4), form)
    source = TarSource(str(tmp_path / "in"), BadSampleCounter(), cache=tmp_path / "cache")
    assert numbers(source) == list(range(12))
    assert (
        source[7]
        == TarSource(str(tmp_path / "in"), BadSampleCounter(), cache=tmp_path / "cache")[7]
    )


def test_the_listing_of_a_tar_is_kept_until_the_tar_changes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "in" / "0.tar", range(3))

    def opened():
        return TarSource(str(tmp_path / "in"), BadSampleCounter(), cache=tmp_path / "cache")

    before = opened()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("listed again"))
        again = opened()
    assert numbers(again) == numbers(before) == [0, 1, 2]
    assert again.fingerprint == before.fingerprint
    path.unlink()
    write_tar(path, range(5))
    assert numbers(opened()) == [0, 1, 2, 3, 4]
    assert opened().fingerprint != before.fingerprint


@pytest.mark.parametrize("kind", ["folder", "tars", "records"])
def test_a_copy_elsewhere_is_the_same_data(tmp_path, kind):
    write_folder(tmp_path / "a" / "folder", 3)
    write_tar(tmp_path / "a" / "tars" / "0.tar", range(3))
    write_array_record(tmp_path / "a" / "records" / "0.array_record", range(3))
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)

    def mark(name):
        path, skipped = str(tmp_path / name / kind), BadSampleCounter()
        if kind == "tars":
            return TarSource(path, skipped, cache=tmp_path / "cache").fingerprint
        return (FolderSource if kind == "folder" else RecordSource)(path, skipped).fingerprint

    assert mark("a") == mark("b")
    write_folder(tmp_path / "b" / "folder", 4)
    write_tar(tmp_path / "b" / "tars" / "0.tar", range(4))
    write_array_record(tmp_path / "b" / "records" / "1.array_record", range(3))
    assert mark("a") != mark("b")


def test_samples_of_a_tar_that_lack_something_are_counted(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as tar:
        add(tar, "a/1.txt", caption(1).encode())  # in the other order, in a folder
        add(tar, "a/1.png", encoded(1))
        add(tar, "a/2.png", encoded(2))
        add(tar, "b/2.txt", b"")
        add(tar, "b/2.png", encoded(3))
        add(tar, "4.json", b"{}")
        add(tar, "4.txt", caption(4).encode())
        add(tar, "5.png", encoded(5))
        add(tar, "5.txt", caption(5).encode())
    skipped = BadSampleCounter(0.9)
    source = TarSource(str(tmp_path / "in"), skipped, cache=tmp_path / "cache")
    assert numbers(source) == [1, 5]
    assert skipped.counts() == {"without caption": 1, "empty caption": 1, "without image": 1}
    skipped = BadSampleCounter(0.9)
    alone = TarSource(str(tmp_path / "in"), skipped, cache=tmp_path / "cache", captions=False)
    assert [r["image"] for r in map(alone.__getitem__, range(4))] == [*map(encoded, (1, 2, 3, 5))]
    assert skipped.counts() == {"without image": 1}


def test_a_tar_that_breaks_off_anywhere_keeps_its_whole_samples(tmp_path):
    data = write_tar(tmp_path / "whole.tar", range(3), "png").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in tar if m.name.endswith("txt")]
    path = tmp_path / "in" / "0.tar"
    path.parent.mkdir()
    for cut in range(700, ends[-1], 997):
        path.write_bytes(data[:cut])
        skipped = BadSampleCounter()
        with pytest.warns(UserWarning, match=r"0\.tar: truncated or broken tar, skipped"):
            source = TarSource(str(path.parent), skipped, cache=tmp_path / f"cache{cut}")
        # of the samples that end before the cut, the last is given up: was there more of it?
        whole = sum(end <= cut for end in ends)
        assert numbers(source) in ([*range(whole)], [*range(whole - 1)])
        assert skipped.counts() == {"truncated or broken tar": 1}
    path.write_bytes(b"no tar at all" * 100)
    with pytest.warns(UserWarning, match="truncated or broken tar"):
        assert not len(TarSource(str(path.parent), BadSampleCounter(), cache=tmp_path / "other"))


def test_array_records_hold_bytes_and_captions(tmp_path):
    write_array_record(tmp_path / "0.array_record", range(3))
    write_array_record(tmp_path / "1.array_record", range(3, 5))
    assert numbers(RecordSource(str(tmp_path), BadSampleCounter())) == [0, 1, 2, 3, 4]


def test_array_records_may_name_the_image_as_before(tmp_path):
    records = [{"picture": encoded(i), "caption": caption(i)} for i in range(2)]
    write_records(tmp_path / "0.array_record", records)
    source = RecordSource(str(tmp_path), BadSampleCounter())
    assert numbers(source) == [0, 1]
    assert source.head(1, 8)[:8] == encoded(1)[:8]


def test_broken_array_records_are_counted(tmp_path):
    write_array_record(tmp_path / "0.array_record", range(2))
    odd = [{"image": 3, "caption": ""}, {"image": b"x", "caption": ""}]
    assert write_records(tmp_path / "1.array_record", odd) == 2
    whole = write_array_record(tmp_path / "whole", range(3)).read_bytes()
    (tmp_path / "2.array_record").write_bytes(whole[: len(whole) - 100])
    skipped = BadSampleCounter()
    with pytest.warns(UserWarning, match=r"2\.array_record: truncated or broken ArrayRecord file"):
        source = RecordSource(str(tmp_path), skipped)
    assert skipped.counts() == {"truncated or broken ArrayRecord file": 1}
    assert len(source) == 4
    for index, reason in ((2, "broken record"), (3, "empty caption")):
        with pytest.raises(BadSampleError, match=reason):
            source[index]


def test_records_that_fail_half_way_leave_no_file(tmp_path):
    def failing():
        yield {"image": b""}
        raise KeyError

    with pytest.raises(KeyError):
        write_records(tmp_path / "x.array_record", failing())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pictures", [1, 300])  # noticed at the end, or long before it
def test_a_disk_that_takes_no_more_is_one_sentence(tmp_path, pictures):
    rng, path = np.random.default_rng(0), tmp_path / "x.array_record"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
    try:
        with pytest.raises(WriteError, match=f"^{path}: got file too large, expected a file to"):
            write_records(path, ({"image": rng.bytes(20_000)} for _ in range(pictures)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def bucket(tmp_path):
    """Copies a local folder into fsspec's memory, gives its URL."""
    memory = fsspec.filesystem("memory")

    def upload(folder):
        for path in folder.rglob("*"):
            if path.is_file():
                memory.pipe_file(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
        return "memory://bucket"

    yield upload
    memory.rm("/bucket", recursive=True)


def test_folders_tars_and_parquet_may_lie_in_a_bucket(tmp_path, bucket):
    write_folder(tmp_path / "a" / "folder", 3)
    write_tar(tmp_path / "a" / "tars" / "0.tar", range(3, 7))
    write_parquet(tmp_path / "a" / "parquet" / "0.parquet", range(7, 12))
    url, cache = bucket(tmp_path / "a"), tmp_path / "cache"
    assert numbers(FolderSource(f"{url}/folder", BadSampleCounter())) == [0, 1, 2]
    assert numbers(TarSource(f"{url}/tars", BadSampleCounter(), cache=cache)) == [3, 4, 5, 6]
    parquet = ParquetSource(f"{url}/parquet", BadSampleCounter(), cache=cache)
    assert numbers(parquet) == [7, 8, 9, 10, 11]


def test_array_record_needs_a_local_folder(tmp_path, bucket):
    write_array_record(tmp_path / "0.array_record", range(2))
    with pytest.raises(InputError, match=r"memory://bucket, expected a local"):
        RecordSource(bucket(tmp_path), BadSampleCounter())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "expected a folder with files"),
        ("nothing://x", "expected a folder or a URL that fsspec opens"),
    ],
)
def test_paths_that_are_none_are_named(path, message):
    with pytest.raises(InputError, match=f"data.path: got {path}.*{message}"):
        FolderSource(path, BadSampleCounter())


def test_folders_without_the_wanted_files_are_named(tmp_path):
    write_folder(tmp_path, 1)
    with pytest.raises(InputError, match=r"got no \.tar files"):
        TarSource(str(tmp_path), BadSampleCounter(), cache=tmp_path)
    with pytest.raises(InputError, match=r"without \.array_record files"):
        RecordSource(str(tmp_path), BadSampleCounter())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        HubSource("x")


def parquet(folder, skipped=None, **options):
    return ParquetSource(
        str(folder), skipped or BadSampleCounter(), cache=folder.parent / "c", **options
    )


def test_parquet_files_are_read_by_split_in_runs(tmp_path):
    folder = tmp_path / "in"
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", range(4, 6))
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", range(4))
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", range(6, 9))
    source = parquet(folder)
    assert isinstance(source, BlockSource)
    assert numbers(source) == [0, 1, 2, 3, 4, 5]
    assert source.block_starts.tolist() == [0, 3, 4, 6]
    assert parquet(folder).fingerprint == source.fingerprint  # listed anew from the cache
    assert numbers(parquet(folder, split="test")) == [6, 7, 8]
    assert parquet(folder, captions=False)[1] == {"image": encoded(1), "caption": ""}
    with pytest.raises(InputError, match=r"expected \.parquet files of the split 'validation'"):
        parquet(folder, split="validation")
    with pytest.raises(InputError, match="got the columns image, text, expected 'caption'"):
        parquet(folder, caption_key="caption")


def test_parquet_files_without_a_split_in_their_names_are_all_read(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", range(2))
    assert numbers(parquet(tmp_path / "in")) == [0, 1]


def test_a_row_group_is_read_once_while_it_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxdiff.data.sources.parquet.MAX_CACHED_BYTES", 1)  # two of them are kept
    write_parquet(tmp_path / "in" / "a.parquet", range(9))
    source, read = parquet(tmp_path / "in"), []
    inner = source._read
    monkeypatch.setattr(source, "_read", lambda *place: read.append(place) or inner(*place))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: source[i]["caption"], [0, 1, 2, 3, 4, 5, 0]))
    assert found == [caption(i) for i in (0, 1, 2, 3, 4, 5, 0)]
    assert len(read) == 2
    assert [source[i]["caption"] for i in (3, 8, 0)] == [caption(i) for i in (3, 8, 0)]
    assert len(read) == 4  # the oldest of three is forgotten


def test_broken_parquet_files_are_counted(tmp_path):
    folder, skipped = tmp_path / "in", BadSampleCounter()
    write_parquet(folder / "a.parquet", range(3))
    write_parquet(folder / "b.parquet", range(3, 6))
    whole = (folder / "b.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"b\.parquet: truncated or broken Parquet file, skipped"):
        source = parquet(folder, skipped)
    assert numbers(source) == [0, 1, 2]
    assert skipped.counts() == {"truncated or broken Parquet file": 1}
    # Whole when it was listed, broken when it is read.
    data = bytearray((folder / "a.parquet").read_bytes())
    data[4:200] = bytes(196)
    (folder / "a.parquet").write_bytes(data)
    (folder / "b.parquet").unlink()
    fresh = parquet(folder)
    for _ in range(2):
        with pytest.raises(BadSampleError, match="truncated or broken Parquet file"):
            fresh[0]


def test_a_missing_package_for_parquet_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        parquet(tmp_path)


@pytest.mark.filterwarnings("default")  # of the package itself
def test_a_dataset_of_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = str(write_folder(tmp_path / "in", 3, table=True))
    assert numbers(HubSource(folder)) == [0, 1, 2]
    alone = HubSource(folder, captions=False)
    assert alone[1] == {"image": encoded(1), "caption": ""}
    with pytest.raises(InputError, match="got the columns image, text, expected 'caption'"):
        HubSource(folder, caption_key="caption")
    with pytest.raises(InputError, match="expected a dataset with the split 'test'"):
        HubSource(folder, split="test")


def test_a_few_broken_items_are_borne_and_many_are_not():
    skipped = BadSampleCounter(0.5, floor=2)
    skipped.seen(2)
    skipped.broken("a", 2)  # all, but few
    skipped.seen(4)
    skipped.broken("b")  # 3 of 6
    with pytest.raises(
        InputError, match=r"got 4 bad samples among 6 \(2 a, 2 b\), expected at most"
    ):
        skipped.broken("b")
    assert skipped.counts() == {"a": 2, "b": 2}
