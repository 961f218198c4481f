import base64
import collections
import json
import tarfile

import fsspec
import numpy as np
import pytest
from image_jobs import KEY, item, settings, writing
from PIL import Image

from jaxdiff.core.errors import InputError, WriteError
from jaxdiff.data.bad_samples import BadSampleCounter
from jaxdiff.data.sources.tars import TarSource
from jaxdiff.generation import openai_output, places
from jaxdiff.generation.image_files import read_settings, settings_in
from jaxdiff.generation.open_output import open_output
from jaxdiff.generation.outputs import FOLDER_SIZE, folder_of
from jaxdiff.generation.places import LocalPlace, RemotePlace
from jaxdiff.generation.shards import Shard


def write(where, *items, **options):
    """The lines of the manifest of a job with these images."""
    output = open_output(where, **{"key": KEY} | options)
    for each in items:
        output.write(each)
    output.close()
    return output.manifest


def manifest_lines(where, label="00000-of-00001"):
    path = where / ".jobs" / KEY / f"{label}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(where):
    found = where.rglob("*")
    return sorted(str(p.relative_to(where)) for p in found if p.is_file() and ".jobs" not in str(p))


def test_a_folder_has_a_file_for_each_image(tmp_path):
    images = [item(3), item(12_345, 1, count=2), item(7, 20_001, count=30_000)]
    done = write(tmp_path, *images)
    assert files(tmp_path) == [
        "000000/000003_star_0.png",
        "000002/012345_star_1.png",
        "000007-002/000007_star_20001.png",
    ]
    first = manifest_lines(tmp_path)[1]
    path = tmp_path / "000000/000003_star_0.png"
    assert first == {
        "index": 3,
        "number": 0,
        "source": "p.jsonl:4",
        "custom_id": "request-3",
        "file": "000000/000003_star_0.png",
        "seed": 30,
        "width": 8,
        "height": 8,
        "size": path.stat().st_size,
    }
    assert read_settings(path) == settings(3)
    assert len(done) == 3
    assert [p.name for p in (tmp_path / ".jobs" / KEY).iterdir()] == ["00000-of-00001.jsonl"]


@pytest.mark.parametrize("count", [1, 3, 10, 9_999, 10_000, 25_000])
def test_a_folder_has_at_most_so_many_images(count):
    folders = collections.Counter(
        folder_of(index, number, count)
        for index in range(3 * FOLDER_SIZE // count + 2)
        for number in range(count)
    )
    assert max(folders.values()) <= FOLDER_SIZE
    assert len(folders) <= sum(folders.values()) / FOLDER_SIZE * 2 + 1


def test_one_folder_for_a_small_job(tmp_path):
    write(tmp_path, item(3), image_format="webp", quality=50, subfolders=False)
    assert files(tmp_path) == ["000003_star_0.webp"]
    assert read_settings(tmp_path / "000003_star_0.webp") == settings(3)


def test_an_item_has_a_format_of_its_own(tmp_path):
    small = item(1, image_format="jpeg", quality=5)
    write(tmp_path, small, item(2), item(3, image_format="webp"), subfolders=False)
    assert files(tmp_path) == ["000001_star_0.jpg", "000002_star_0.png", "000003_star_0.webp"]


def test_nothing_is_overwritten(tmp_path):
    write(tmp_path, item(1), subfolders=False)
    path = tmp_path / "000001_star_0.png"
    before = path.read_bytes()
    other = item(1, settings=settings(1) | {"steps": 9}, image=np.zeros((8, 8, 3), np.uint8))
    for _ in range(2):
        write(tmp_path, other, key="other", subfolders=False)
    first, second = sorted(tmp_path.glob("*.png"), key=lambda p: len(p.name))
    assert first.read_bytes() == before
    assert second.name.startswith("000001_star_0-")
    assert read_settings(second)["steps"] == 9
    # The same settings: the file that is there counts.
    write(tmp_path, item(1, image=np.zeros((8, 8, 3), np.uint8)), key="third", subfolders=False)
    assert len(files(tmp_path)) == 2
    assert path.read_bytes() == before
    second.write_bytes(b"damaged")
    write(tmp_path, other, key="fourth", subfolders=False)
    assert read_settings(second)["steps"] == 9


def test_a_file_that_was_removed_is_written_again(tmp_path):
    write(tmp_path, *(item(i) for i in range(3)))
    (tmp_path / "000000/000001_star_0.png").unlink()
    output = open_output(tmp_path, key=KEY)
    assert [output.done(i, 0) for i in range(4)] == [True, False, True, False]
    output.write(item(1))
    output.close()
    assert len(files(tmp_path)) == 3


def test_failures_are_recorded_and_tried_again(tmp_path):
    latents = np.ones((4, 4, 2), np.float32)
    bad = latents.copy()
    bad[0, 0, 0] = np.nan
    output = open_output(tmp_path, key=KEY, image_format="latents")
    output.write(item(1, image=bad))
    output.write(item(2, image=latents))
    output.fail(3, None, "p.jsonl:4: got no prompt", source="p.jsonl:4")
    output.close()
    reason = "image: got numbers that are not finite, expected an image"
    errors = {key: line["error"] for key, line in output.manifest.failures.items()}
    assert errors == {(1, 0): reason, (3, None): "p.jsonl:4: got no prompt"}
    output = open_output(tmp_path, key=KEY, image_format="latents")
    assert [output.done(i, 0) for i in (1, 2, 3)] == [False, True, False]
    output.write(item(1, image=latents))
    output.close()
    assert list(output.manifest.failures) == [(3, None)]
    assert files(tmp_path) == [f"000000/00000{i}_star_0.safetensors" for i in (1, 2)]


def test_settings_that_a_file_cannot_hold_are_a_failure(tmp_path):
    long = settings(1) | {"prompt": "star " * 20_000}
    output = write(tmp_path, item(1, settings=long), item(2), image_format="jpeg")
    assert "settings of" in output.failures[1, 0]["error"]
    assert output.done(2, 0)


def test_shards_share_a_folder(tmp_path):
    for index in range(2):
        shard = Shard(index, 2, unit_size=1)
        write(tmp_path, *(item(i) for i in range(index, 6, 2)), shard=shard)
    assert len(files(tmp_path)) == 6
    whole = open_output(tmp_path, key=KEY)
    assert all(whole.done(i, 0) for i in range(6))
    whole.close()


def test_tars_are_read_by_our_reader(tmp_path):
    where = tmp_path / "tars"
    write(where, *(item(i) for i in range(25)), container="tar", images_per_tar=10)
    assert files(where) == [f"00000-{i:06d}.tar" for i in range(3)]
    source = TarSource(str(where), BadSampleCounter(0, 0), cache=tmp_path / "cache")
    assert len(source) == 25
    assert [source[i]["caption"] for i in range(25)] == [f"star {i}" for i in range(25)]
    (tmp_path / "a.png").write_bytes(source[24]["image"])
    assert read_settings(tmp_path / "a.png") == settings(24)
    with Image.open(tmp_path / "a.png") as image:
        assert image.getpixel((0, 0)) == ((17 * 24) % 256,) * 3
    assert manifest_lines(where)[-1]["file"] == "00000-000002.tar/000024_star_0.png"
    with tarfile.open(where / "00000-000002.tar") as tar:
        data = json.load(tar.extractfile("000024_star_0.json"))
    assert data["entry"]["source"] == "p.jsonl:25"


def test_tars_of_some_bytes(tmp_path):
    size = 3000
    write(tmp_path, *(item(i) for i in range(20)), container="tar", bytes_per_tar=size)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.tar")]
    assert len(sizes) > 3


def test_a_tar_appears_when_it_is_complete(tmp_path):
    output = open_output(tmp_path, key=KEY, container="tar", images_per_tar=3)
    for index in range(5):
        output.write(item(index))
    assert files(tmp_path) == ["00000-000000.tar"]
    assert [output.done(i, 0) for i in range(5)] == [True, True, True, False, False]
    output.abort()  # as if it were killed
    output = open_output(tmp_path, key=KEY, container="tar", images_per_tar=3)
    for index in range(5):
        if not output.done(index, 0):
            output.write(item(index))
    output.close()
    assert files(tmp_path) == ["00000-000000.tar", "00000-000001.tar"]
    assert len(output.manifest) == 5


def test_a_tar_that_was_not_recorded_yet_counts(tmp_path, monkeypatch):
    """The process was killed after the tar had its name, before the manifest had its images."""
    output = open_output(tmp_path, key=KEY, container="tar", images_per_tar=3)
    intend = output.manifest.intend

    def intend_only(name):
        intend(name)
        monkeypatch.setattr(output.manifest, "record", lambda entry: None)

    monkeypatch.setattr(output.manifest, "intend", intend_only)
    for index in range(3):
        output.write(item(index))
    output.close()
    assert not any("file" in line for line in manifest_lines(tmp_path))
    output = open_output(tmp_path, key=KEY, container="tar", images_per_tar=3)
    assert [output.done(i, 0) for i in range(4)] == [True, True, True, False]
    output.write(item(3))
    output.close()
    assert files(tmp_path) == ["00000-000000.tar", "00000-000001.tar"]
    lines = [line for line in manifest_lines(tmp_path) if "file" in line]
    assert [line["file"].split("/")[0][-5] for line in lines] == ["0", "0", "0", "1"]


def test_a_tar_that_was_removed_is_written_again(tmp_path):
    write(tmp_path, *(item(i) for i in range(6)), container="tar", images_per_tar=3)
    (tmp_path / "00000-000000.tar").unlink()
    output = open_output(tmp_path, key=KEY, container="tar", images_per_tar=3)
    assert [output.done(i, 0) for i in range(6)] == [False] * 3 + [True] * 3
    output.close()


def test_tars_of_another_job_are_refused(tmp_path):
    write(tmp_path, item(1), container="tar")
    with pytest.raises(InputError, match=r"tars of another job, such as 00000-000000\.tar"):
        open_output(tmp_path, key="other", container="tar")
    assert [path.name for path in (tmp_path / ".jobs").iterdir()] == [KEY]


def openai(where, *items, **options):
    return write(where, *items, container="openai", prompts="/x/in.jsonl.gz", **options)


def read_json(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_request_is_answered_once_all_its_images_are_there(tmp_path):
    output = open_output(tmp_path, key=KEY, container="openai", prompts="in.jsonl")
    output.write(item(1, 1, count=2))
    output.write(item(0))
    output.write(item(1, 0, count=2))
    output.write(item(2, 0, count=2))  # the other one is never made
    output.close()
    answers = read_json(tmp_path / "in_output.jsonl")
    assert [answer["custom_id"] for answer in answers] == ["request-0", "request-1"]
    data = answers[1]["response"]["body"]["data"]
    seeds = []
    for each in data:
        (tmp_path / "a.png").write_bytes(base64.b64decode(each["b64_json"]))
        seeds.append(read_settings(tmp_path / "a.png")["seed"])
    assert seeds == [10, 11]
    assert files(tmp_path) == ["a.png", "in_output.jsonl"]
    assert [output.done(*image) for image in ((0, 0), (1, 0), (1, 1), (2, 0))] == [True] * 3 + [
        False
    ]


def test_each_bad_request_is_in_the_error_file_once(tmp_path):
    output = open_output(tmp_path, key=KEY, container="openai", prompts="in.jsonl")
    output.write(item(2, 0, count=3))
    for number in (1, 2):
        output.fail(2, number, "not finite", custom_id="request-2")
    output.fail(1, None, "in.jsonl:2: got no prompt", custom_id="request-1")
    output.write(item(3))
    output.close()
    first, second = read_json(tmp_path / "in_error.jsonl")
    assert (first["custom_id"], first["response"]) == ("request-1", None)
    assert first["error"] == {"code": "invalid_request", "message": "in.jsonl:2: got no prompt"}
    assert second["error"] == {"code": "generation_failed", "message": "not finite"}
    openai(tmp_path, *(item(2, number, count=3) for number in range(3)))
    assert [each["custom_id"] for each in read_json(tmp_path / "in_error.jsonl")] == ["request-1"]
    openai(tmp_path, item(1))
    assert files(tmp_path) == ["in_output.jsonl"]
    answers = [each["custom_id"] for each in read_json(tmp_path / "in_output.jsonl")]
    assert answers == ["request-3", "request-2", "request-1"]


def test_what_the_manifest_does_not_know_of_is_cut_off(tmp_path):
    openai(tmp_path, item(0))
    path = tmp_path / "in_output.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-1])
    openai(tmp_path, item(1))
    assert [each["custom_id"] for each in read_json(path)] == ["request-0", "request-1"]
    path.unlink()
    output = openai(tmp_path, item(0))
    assert not output.done(1, 0)
    assert [each["custom_id"] for each in read_json(path)] == ["request-0"]


def test_output_files_of_another_job_are_refused(tmp_path):
    openai(tmp_path, item(0))
    with pytest.raises(InputError, match=r"in_output\.jsonl, which another job has written"):
        openai(tmp_path, key="other")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "in_error.jsonl").write_text("x")
    with pytest.raises(InputError, match=r"in_error\.jsonl, which another job has written"):
        openai(tmp_path / "new")
    openai(tmp_path / "new", shard=Shard(1, 2))  # has a name of its own
    assert "in_output-00001-of-00002.jsonl" in files(tmp_path / "new")


def test_lines_without_a_name_are_failures(tmp_path):
    output = openai(tmp_path, item(0, custom_id=None))
    assert "got no field 'custom_id'" in output.failures[0, 0]["error"]


@pytest.mark.parametrize("container", ["folder", "tar", "openai"])
def test_storages(container, monkeypatch):
    monkeypatch.setattr(openai_output, "PART_SIZE", 1000)
    fs = fsspec.filesystem("memory")
    root = f"/{container}/out"
    options = {"container": container, "images_per_tar": 2, "prompts": "in.jsonl", "key": KEY}
    output = open_output(f"memory:/{root}", **options)
    for index in range(3):
        output.write(item(index))
    output.fail(9, 0, "bad", custom_id="request-9")
    output.close()
    output = open_output(f"memory:/{root}", **options)
    assert [output.done(i, 0) for i in range(4)] == [True, True, True, False]
    output.write(item(3))
    output.close()
    names = {name.removeprefix(f"{root}/") for name in fs.find(root) if ".jobs" not in name}
    if container == "folder":
        assert names == {f"000000/00000{i}_star_0.png" for i in range(4)}
        assert settings_in(fs.open(f"{root}/000000/000003_star_0.png"), source="") == settings(3)
    elif container == "tar":
        assert names == {f"00000-{i:06d}.tar" for i in range(3)}
    else:
        parts = sorted(name for name in names if "output" in name)
        assert len(parts) >= 3
        assert names - {*parts} == {"in_error.jsonl"}
        lines = [json.loads(x) for name in parts for x in fs.cat(f"{root}/{name}").splitlines()]
        assert [line["custom_id"] for line in lines] == [f"request-{i}" for i in range(4)]
    if container != "folder":
        with pytest.raises(InputError, match="another job"):
            open_output(f"memory:/{root}", **options | {"key": "other"})


def test_a_part_that_was_not_recorded_is_written_again():
    where, fs = "memory://orphan/out", fsspec.filesystem("memory")
    openai(where, item(0))
    output = open_output(where, key=KEY, container="openai", prompts="in.jsonl")
    output.manifest.intend("in_output-000001.jsonl")
    output.abort()  # killed before the manifest had the lines of the part
    fs.pipe("/orphan/out/in_output-000001.jsonl", b"{}\n")
    openai(where, item(1))
    names = sorted(name for name in fs.find("/orphan/out") if ".jobs" not in name)
    lines = [json.loads(line) for name in names for line in fs.cat(name).splitlines()]
    assert [line["custom_id"] for line in lines] == ["request-0", "request-1"]


def test_an_existing_object_is_not_overwritten():
    where, fs = "memory://kept/out", fsspec.filesystem("memory")
    fs.pipe("/kept/out/000000/000001_star_0.png", b"mine")
    write(where, item(1))
    assert fs.cat("/kept/out/000000/000001_star_0.png") == b"mine"
    assert len(fs.find("/kept/out/000000")) == 2


def test_a_storage_without_an_answer_is_asked_again(monkeypatch):
    monkeypatch.setattr(places, "FIRST", 0.0)
    place = RemotePlace("memory://retry/out")
    put, answers = place._fs.pipe_file, iter([True, True, False])

    def pipe_file(*arguments):
        if next(answers):
            raise ConnectionError("refused\nand more")
        put(*arguments)

    monkeypatch.setattr(place._fs, "pipe_file", pipe_file)
    assert place.write("a", b"data", replace=True)
    assert place.read("a") == b"data"
    answers = iter([True] * 9)
    monkeypatch.setattr(places, "RETRY_SECONDS", -1.0)
    with pytest.raises(WriteError, match=r"^memory://retry/out/a: got refused, expected a file"):
        place.write("a", b"data", replace=True)

    def no_bucket(*arguments):
        raise FileNotFoundError("out")

    monkeypatch.setattr(place._fs, "pipe_file", no_bucket)
    with pytest.raises(WriteError, match=r"^memory://retry/out/b: got no such file, expected"):
        place.write("b", b"data", replace=False)
    assert place.read("b") is None


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "link", "replace"):
        act = getattr(places.os, name)
        monkeypatch.setattr(
            places.os, name, lambda *a, name=name, act=act: (calls.append(name), act(*a))
        )
    (tmp_path / "new").mkdir()
    place = LocalPlace(tmp_path / "new")
    assert place.write("a", b"1", replace=False)
    assert calls == ["fsync", "link"]
    (tmp_path / "b").write_bytes(b"2")
    assert place.publish("b", tmp_path / "b", replace=False)
    assert calls == ["fsync", "link"] * 2
    place.sync([""])
    assert calls[4:] == ["fsync"]
    assert place.names() == {"a", "b"}


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(places.os, "link", link)
    place = LocalPlace(tmp_path)
    assert place.write("x/a", b"1", replace=False)
    assert not place.write("x/a", b"2", replace=False)
    assert place.write("x/a", b"3", replace=True)
    assert (tmp_path / "x" / "a").read_bytes() == b"3"
    assert place.names("x") == {"a"}


def test_places_that_are_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output: got .*file, which is a file, expected a folder"):
        open_output(tmp_path / "file", key=KEY)
    with pytest.raises(InputError, match=r"/file/below.*not a directory"):
        open_output(tmp_path / "file" / "below", key=KEY)
    with pytest.raises(InputError, match="nosuch"):
        open_output("nosuch://a", key=KEY)
    with pytest.raises(InputError, match=r"^container: got 'zip', expected one of folder"):
        open_output(tmp_path, key=KEY, container="zip")
    with pytest.raises(InputError, match=r"^prompts: got none with the container openai"):
        open_output(tmp_path, key=KEY, container="openai")
    with pytest.raises(InputError, match=r"^key: got '\.\./x'"):
        open_output(tmp_path, key="../x")
    open_output(f"file://{tmp_path}/new", key=KEY).close()
    assert (tmp_path / "new" / ".jobs").is_dir()


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path, monkeypatch):
    write_file = LocalPlace.write
    budget = iter(range(5))

    def write_some(self, name, data, *, replace):
        if next(budget, None) is None:
            with places.os_errors_as_write_error(self.root / name):
                raise OSError(28, "No space left on device")
        return write_file(self, name, data, replace=replace)

    monkeypatch.setattr(LocalPlace, "write", write_some)
    with (  # noqa: PT012
        pytest.raises(WriteError, match=r"png: got no space left on device, expected a file"),
        writing(open_output(tmp_path, key=KEY)) as write,
    ):
        for index in range(100):
            write(item(index))
    monkeypatch.setattr(LocalPlace, "write", write_file)
    output = open_output(tmp_path, key=KEY)
    assert len(output.manifest) == 5 == len(files(tmp_path))
    output.close()
