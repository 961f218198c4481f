import json
import time

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdiff.core.errors import InputError, WriteError
from jaxdiff.generation import job_manifest, places
from jaxdiff.generation.job_manifest import ImageSet, JobManifest
from jaxdiff.generation.places import LocalPlace, PartsLog, open_place
from jaxdiff.generation.shards import Shard

KEY = "abc"


def entry(index, number=0, **more):
    file = f"{index}-{number}.png"
    return {"index": index, "number": number, "source": "p", "file": file, "seed": 3} | more


def failure(index, number=0, reason="bad"):
    return {"index": index, "number": number, "source": "p", "error": reason}


def manifest(where, shard=None, **options):
    return JobManifest(
        open_place(where), KEY, shard or Shard(), **{"container": "folder"} | options
    )


def lines_of(where, label="00000-of-00001"):
    return (where / ".jobs" / KEY / f"{label}.jsonl").read_text().splitlines()


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 40))),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 40))),
)
def test_a_set_of_images_is_a_set(images, others):
    found = ImageSet()
    for image in images:
        found.add(*image)
    assert len(found) == len(set(images))
    for image in images + others:
        assert (image in found) == (image in set(images))


def test_millions_of_images_are_few_bytes():
    found = ImageSet()
    for index in range(0, 2_000_000, 256):
        found.add(index, 0)
    found.add(0, 999_999)
    pages = found._pages.values()
    assert sum(len(page) for page in pages) <= 2_001_000


def test_what_is_recorded_is_done_after_a_restart(tmp_path):
    first = manifest(tmp_path)
    assert first.is_new
    first.record(entry(3))
    first.record(entry(3, 1, custom_id="é"))
    first.record(failure(4))
    first.close()
    header, *lines = map(json.loads, lines_of(tmp_path))
    assert header == {"job": KEY, "shard": "0/1", "container": "folder", "version": 1}
    assert lines == [entry(3), entry(3, 1, custom_id="é"), failure(4)]
    second = manifest(tmp_path)
    assert not second.is_new
    assert [second.done(3, n) for n in range(3)] == [True, True, False]
    assert not second.done(4, 0)
    assert second.failures == {(4, 0): failure(4)}
    assert len(second) == 2
    second.record(entry(4))
    assert second.failures == {}
    second.close()
    third = manifest(tmp_path)
    assert third.done(4, 0)
    assert third.failures == {}
    assert third.path == str(tmp_path / ".jobs" / KEY / "00000-of-00001.jsonl")
    third.close()


def test_a_failure_is_recorded_once_for_each_reason(tmp_path):
    for reasons in (["bad", "bad"], ["bad"], ["worse"]):
        opened = manifest(tmp_path)
        for reason in reasons:
            opened.record(failure(1, None, reason))
        opened.close()
    assert [json.loads(line)["error"] for line in lines_of(tmp_path)[1:]] == ["bad", "worse"]
    opened = manifest(tmp_path)
    assert opened.failures == {(1, None): failure(1, None, "worse")}
    opened.close()


def test_a_cut_last_line_is_replaced(tmp_path):
    opened = manifest(tmp_path)
    opened.record(entry(1))
    opened.record(entry(2))
    opened.close()
    path = tmp_path / ".jobs" / KEY / "00000-of-00001.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    again = manifest(tmp_path)
    assert [again.done(1, 0), again.done(2, 0)] == [True, False]
    again.record(entry(5))
    again.close()
    assert [json.loads(line).get("index") for line in lines_of(tmp_path)] == [None, 1, 5]


def test_lines_that_a_disk_has_damaged_are_passed_over(tmp_path):
    opened = manifest(tmp_path)
    opened.record(entry(1))
    opened.close()
    path = tmp_path / ".jobs" / KEY / "00000-of-00001.jsonl"
    more = bytes(9) + b"\n[1]\n" + json.dumps(entry(2)).encode() + b"\n"
    path.write_bytes(path.read_bytes() + more)
    again = manifest(tmp_path)
    assert [again.done(1, 0), again.done(2, 0)] == [True, True]
    again.close()


def test_files_that_are_gone_are_not_done(tmp_path):
    opened = manifest(tmp_path)
    opened.record(entry(1))
    opened.record(entry(2))
    opened.close()
    again = manifest(tmp_path, is_there=lambda line: line["index"] != 1)
    assert [again.done(1, 0), again.done(2, 0)] == [False, True]
    again.close()


def test_lines_are_written_in_groups_soon_and_behind_their_files(tmp_path, monkeypatch):
    calls = []
    append, sync = places.LocalLog.append, LocalPlace.sync
    monkeypatch.setattr(places.LocalLog, "append", lambda *a: (calls.append(a[1]), append(*a)))
    monkeypatch.setattr(LocalPlace, "sync", lambda *a: (calls.append(a[1]), sync(*a)))
    monkeypatch.setattr(job_manifest, "SECONDS", 0.05)
    opened = manifest(tmp_path)
    del calls[:]
    for index in range(100):
        opened.record(entry(index))
    deadline = time.monotonic() + 10
    while len(lines_of(tmp_path)) < 101:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(calls) <= 8
    assert [type(call) for call in calls[:2]] == [list, bytes]
    opened.close()


def test_an_error_of_the_disk_is_raised_by_the_next_call(tmp_path, monkeypatch):
    monkeypatch.setattr(job_manifest, "SECONDS", 0.01)
    opened = manifest(tmp_path)

    def full(data):
        raise WriteError("x: got no space left on device, expected a file to write")

    monkeypatch.setattr(opened._log, "append", full)
    opened.record(entry(1))
    opened._thread.join()
    with pytest.raises(WriteError, match="no space left"):
        opened.record(entry(2))
    with pytest.raises(WriteError, match="no space left"):
        opened.close()


def test_one_process_at_a_time_writes_a_shard(tmp_path):
    opened = manifest(tmp_path)
    with pytest.raises(InputError, match=r"got shard 0/1 of .*, which another process writes"):
        manifest(tmp_path)
    other = manifest(tmp_path, Shard(1, 2))
    other.close()
    opened.close()
    manifest(tmp_path).close()


def test_another_container_is_refused(tmp_path):
    manifest(tmp_path).close()
    with pytest.raises(InputError, match="whose images are in a folder, expected a tar"):
        manifest(tmp_path, container="tar")


def test_another_job_has_another_manifest(tmp_path):
    first = manifest(tmp_path)
    first.record(entry(1))
    first.close()
    other = JobManifest(open_place(tmp_path), "def", Shard(), container="folder")
    assert not other.done(1, 0)
    other.close()


@pytest.mark.parametrize("url", [None, "memory://reshard/out"])
def test_another_number_of_shards_resumes_too(tmp_path, url):
    where = url or tmp_path
    for index in range(2):
        shard = Shard(index, 2, unit_size=1)
        opened = manifest(where, shard)
        for line in range(10):
            if shard.owns(line):
                opened.record(entry(line))
        opened.close()
    for index in range(3):
        shard = Shard(index, 3, unit_size=1)
        opened = manifest(where, shard)
        assert [opened.done(i, 0) for i in range(10)] == [shard.owns(i) for i in range(10)]
        assert opened.is_new
        opened.close()


def test_a_storage_has_parts(monkeypatch):
    monkeypatch.setattr(PartsLog, "PART_SIZE", 300)
    monkeypatch.setattr(job_manifest, "REMOTE_SECONDS", 0.01)
    fs = fsspec.filesystem("memory")
    for start in (0, 10):
        opened = manifest("memory://parts/out")
        assert [opened.done(index, 0) for index in range(20)] == [i < start for i in range(20)]
        for index in range(start, start + 10):
            opened.record(entry(index))
            opened.flush()
        opened.record(failure(90))
        opened.close()
    names = sorted(fs.ls(f"/parts/out/.jobs/{KEY}/00000-of-00001", detail=False))
    assert len(names) > 4
    assert names[0].endswith("/000000.jsonl")
    lines = [json.loads(line) for name in names for line in fs.cat(name).splitlines()]
    assert [line["index"] for line in lines if "file" in line] == list(range(20))
    assert sum("job" in line for line in lines) == 1
    assert sum("error" in line for line in lines) == 1
