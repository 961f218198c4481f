import csv
import gzip
import itertools
import json
import subprocess
import sys
import time
import tracemalloc

import fsspec
import hypothesis
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdiff.core.errors import InputError
from jaxdiff.generation import input_files, prompt_rows
from jaxdiff.generation.prompt_spec import FIELDS, LoRA, PromptSpec
from jaxdiff.generation.prompt_stream import BadLine, PromptLine, line_images, read_prompts
from jaxdiff.generation.shards import Shard

EVERYTHING = {
    "prompt": "a ring",
    "prompt_2": "b",
    "prompt_3": "c",
    "negative_prompt": "d",
    "negative_prompt_2": "e",
    "negative_prompt_3": "f",
    "guidance_scale": 2.5,
    "guidance": "cfg+rescale:phi=0.7",
    "negative_scale": 3.0,
    "classifier_scale": 0.5,
    "clip_scale": 0.25,
    "steps": 12,
    "sampler": "euler",
    "timestep_spacing": "karras",
    "eta": 0.5,
    "height": 64,
    "width": 128,
    "clip_skip": 1,
    "max_sequence_length": 77,
    "prompt_syntax": False,
    "image": "/a.png",
    "original_image": "/b.png",
    "mask": "/c.png",
    "strength": 0.5,
    "seed": 7,
    "num_images": 3,
    "loras": [{"path": "/x.safetensors", "scale": 0.5}],
    "noise_level": 20,
}
SPEC = PromptSpec(
    **{k: v for k, v in EVERYTHING.items() if k not in ("loras", "noise_level")},
    loras=(LoRA("/x.safetensors", 0.5),),
    options={"noise_level": 20},
)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def prompts(path, **options):
    return [line.spec.prompt for line in read_prompts(path, **options)]


def bad(path, **options):
    return [line for line in read_prompts(path, **options) if isinstance(line, BadLine)]


def write_table(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows(rows)
    return path


def write_parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_every_field_of_a_line_can_be_said_in_every_format(tmp_path):
    assert EVERYTHING.keys() == {*FIELDS, "noise_level"}
    cells = {k: json.dumps(v) if k == "loras" else str(v) for k, v in EVERYTHING.items()}
    files = [
        write(tmp_path / "p.jsonl", json.dumps(EVERYTHING)),
        write_table(tmp_path / "p.csv", [cells.keys(), cells.values()]),
        write_table(tmp_path / "p.tsv", [cells.keys(), cells.values()], "\t"),
        write_parquet(tmp_path / "p.parquet", {k: [v] for k, v in EVERYTHING.items()}),
    ]
    for path in files:
        (line,) = read_prompts(path)
        number = 2 if path.suffix in (".csv", ".tsv") else 1
        assert line == PromptLine(0, f"{path}:{number}", SPEC), path


def test_forms_of_loras(tmp_path):
    loras = ["a.safetensors", "/b:0.5", {"path": "c"}, {"path": "gs://d/e", "scale": 2}]
    path = write(tmp_path / "p.jsonl", json.dumps({"prompt": "x", "loras": loras}))
    (line,) = read_prompts(path)
    assert line.spec.loras == (
        LoRA(str(tmp_path / "a.safetensors"), 1.0),
        LoRA("/b", 0.5),
        LoRA(str(tmp_path / "c"), 1.0),
        LoRA("gs://d/e", 2),
    )
    path = write_table(tmp_path / "p.csv", [["prompt", "loras"], ["x", "/a:2"], ["y", ""]])
    assert [line.spec.loras for line in read_prompts(path)] == [(LoRA("/a", 2.0),), None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sede": 1}, "field: got 'sede', .*did you mean 'seed'"),
        ({"seed": "7"}, "seed: got '7', expected an integer"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**32 - 1, "num_images": 2}, "seed: got 4294967296"),
        ({"num_images": 0}, "num_images: got 0"),
        ({"height": 0}, "height: got 0"),
        ({"steps": True}, "steps: got True, expected an integer"),
        ({"guidance_scale": float("nan")}, "guidance_scale: got nan, expected a finite"),
        ({"prompt_syntax": 1}, "prompt_syntax: got 1, expected true or false"),
        ({"loras": "a"}, "loras: got 'a', expected a list"),
        ({"loras": [3]}, "loras: got 3, expected PATH"),
        ({"loras": [{"scale": 3}]}, "loras: got no field 'path'"),
        ({"loras": [{"path": "a", "weight": 3}]}, "loras: field: got 'weight'"),
        ({"loras": [{"path": "a", "scale": "x"}]}, "loras: scale: got 'x', expected a number"),
        ({"negative_prompt": "\ud83d"}, "negative_prompt: got .*without halves of pairs"),
        ({"prompt": None}, "prompt: got None, expected a string"),
    ],
)
def test_bad_values_are_bad_lines(tmp_path, values, message):
    good = json.dumps({"prompt": "a"})
    line = json.dumps({"prompt": "a"} | values)
    path = write(tmp_path / "p.jsonl", f"{good}\n\n{line}\n{good}\n")
    found = list(read_prompts(path))
    assert [type(line) for line in found] == [PromptLine, BadLine, PromptLine]
    assert [line.index for line in found] == [0, 1, 2]
    assert found[1].source == f"{path}:3"
    with pytest.raises(InputError, match=f"^{path}:3: {message}"):
        raise InputError(found[1].reason)


def test_what_is_no_object_is_a_bad_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'["a"]\n{"prompt": "caf\xe9"}\n{"prompt": \n{"prompt": "a"}\n\0\n')
    reasons = [line.reason for line in bad(path)]
    assert [reason.split(" (")[0] for reason in reasons] == [
        f"{path}:1: got a JSON list, expected an object",
        f"{path}:2: got bytes that are not UTF-8, expected UTF-8, or UTF-16 with a byte order mark",
        f"{path}:3: got invalid JSON",
        f"{path}:5: got a null byte, expected UTF-8, or UTF-16 with a byte order mark",
    ]
    path = write(tmp_path / "p.txt", 'a star\n{"prompt": "a"}\n')
    assert [line.reason for line in bad(path)] == [
        f"{path}:2: got an object, expected it in a .jsonl file"
    ]


def test_a_line_without_end_is_a_bad_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_rows, "MAX_LINE", 1 << 20)
    path = write(tmp_path / "p.txt", "a\n" + "b" * (3 << 20) + "\nc\n")
    first, long, last = read_prompts(path)
    assert (first.spec.prompt, last.spec.prompt, last.index) == ("a", "c", 2)
    assert "got a line of more than 1 MiB" in long.reason


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".csv", ".TSV"])
def test_files_of_windows(tmp_path, encoding, suffix):
    header = "prompt\r\n" if "sv" in suffix.lower() else ""
    data = f"{header}a red star\r\n\r\na café\u2028x\r\n".encode(encoding)
    path = tmp_path / f"p{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert prompts(path) == ["a red star", "a café\u2028x"]


def test_cells_have_several_lines_and_may_be_empty(tmp_path):
    rows = [["prompt", "seed", "eta"], ["a\nb", "", "0.5"], ["", "", ""], ["c", "7.0", ""], ["d"]]
    path = write_table(tmp_path / "p.csv", rows)
    first, second, third = read_prompts(path)
    assert (first.source, first.spec) == (f"{path}:2", PromptSpec(prompt="a\nb", eta=0.5))
    assert (second.source, second.spec) == (f"{path}:5", PromptSpec(prompt="c", seed=7))
    assert third == BadLine(2, f"{path}:6", f"{path}:6: got 1 cells, expected 3")


def test_gaps_in_columns_of_numbers(tmp_path):
    columns = {
        "prompt": ["a", "b", "c"],
        "seed": [1.0, None, float("nan")],
        "steps": [None, 3, None],
        "loras": [["/a:2"], None, []],
    }
    specs = [line.spec for line in read_prompts(write_parquet(tmp_path / "p.parquet", columns))]
    assert specs == [
        PromptSpec(prompt="a", seed=1, loras=(LoRA("/a", 2.0),)),
        PromptSpec(prompt="b", steps=3),
        PromptSpec(prompt="c", loras=()),
    ]


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_columns_are_fields_or_mapped(tmp_path, name):
    path, columns = tmp_path / name, {"caption": ["x"], "id": [3], "aesthetics": [5.5]}
    if name == "p.csv":
        write_table(path, [columns.keys(), [values[0] for values in columns.values()]])
    else:
        write_parquet(path, columns)
    with pytest.raises(InputError, match=r"got the columns caption, id, aesthetics, .*--columns"):
        list(read_prompts(path))
    (line,) = read_prompts(path, columns={"prompt": "caption", "seed": "id"})
    assert line.spec == PromptSpec(prompt="x", seed=3)
    with pytest.raises(InputError, match=r"columns: got seed=nr, expected a column of .*caption, "):
        list(read_prompts(path, columns={"prompt": "caption", "seed": "nr"}))
    with pytest.raises(InputError, match=r"columns: field: got 'sede'.*seed"):
        list(read_prompts(path, columns={"prompt": "caption", "sede": "id"}))
    with pytest.raises(InputError, match="columns: got none of prompt"):
        list(read_prompts(path, columns={"seed": "id"}))


def test_tables_without_prompts(tmp_path):
    with pytest.raises(InputError, match="got no column prompt"):
        list(read_prompts(write_table(tmp_path / "p.csv", [["seed"], ["3"]])))
    with pytest.raises(InputError, match="got seed twice, expected each column once"):
        list(read_prompts(write_table(tmp_path / "q.csv", [["prompt", "seed", "seed"], ["3"]])))
    with pytest.raises(InputError, match=r"^columns: got .*\.txt, expected a \.csv"):
        list(read_prompts(write(tmp_path / "p.txt", "a"), columns={"prompt": "a"}))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt \(no such file\), expected a file to read"):
        list(read_prompts(tmp_path / "none.txt"))
    with pytest.raises(InputError, match=r"expected a file whose name ends in \.txt, \.jsonl"):
        list(read_prompts(tmp_path / "p.xlsx"))
    with pytest.raises(InputError, match=r"p\.parquet .*, expected a Parquet file"):
        list(read_prompts(write(tmp_path / "p.parquet", "no")))
    cut = tmp_path / "p.txt.gz"
    cut.write_bytes(gzip.compress(b"a red star\n" * 1000)[:-20])
    with pytest.raises(InputError, match=r"p\.txt\.gz .*, expected a file to read"):
        list(read_prompts(cut))
    with pytest.raises(InputError, match="expected a file to read"):
        list(read_prompts("nosuch://a/b.txt"))
    cut = tmp_path / "q.txt"
    cut.write_bytes("a star\nb".encode("utf-16") + b"x")
    with pytest.raises(InputError, match="bytes that are not UTF-16-LE after line"):
        list(read_prompts(cut))


def test_parquet_without_its_package(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "p.parquet", {"prompt": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="without the package pyarrow, expected it: pip install"):
        list(read_prompts(path))


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl.gz", "p.parquet"])
def test_shards_have_each_line_once_with_its_index(tmp_path, name):
    texts = [f"star {i}" for i in range(1000)]
    path = tmp_path / name
    if name == "p.parquet":
        write_parquet(path, {"prompt": texts}, row_group_size=300)
    elif name == "p.csv":
        write_table(path, [["prompt"], *([text] for text in texts)])
    elif name == "p.txt":
        write(path, "\n\n".join(texts))
    else:
        path.write_bytes(
            gzip.compress("\n".join(json.dumps({"prompt": t}) for t in texts).encode())
        )
    shards = [Shard(i, 3) for i in range(3)]
    found = [list(read_prompts(path, shard=shard)) for shard in shards]
    every = sorted(itertools.chain(*found))
    assert [line.spec.prompt for line in every] == texts
    assert [line.index for line in every] == list(range(1000))
    assert [line.index for line in found[1]][:65] == [*range(64, 128), 256]
    assert every == list(read_prompts(path))


def test_the_first_line_of_a_long_file_comes_at_once_and_memory_is_bounded(tmp_path):
    text = "".join(f'{{"prompt": "a red star {i}", "seed": {i}}}\n' for i in range(30_000))
    path = write(tmp_path / "p.jsonl", text)
    table = write_parquet(tmp_path / "p.parquet", {"prompt": text.splitlines() * 3})
    next(read_prompts(table))  # imports
    tracemalloc.start()
    try:
        for source in (path, table):
            started = time.perf_counter()
            next(read_prompts(source))
            assert time.perf_counter() - started < 0.5
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in itertools.islice(read_prompts(path, shard=Shard(3, 16)), 1000):
            pass
        assert tracemalloc.get_traced_memory()[1] - before < 4 << 20
    finally:
        tracemalloc.stop()


def test_storages_are_read_as_folders_are(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe("/job/p.jsonl.gz", gzip.compress(b'{"prompt": "a", "image": "/x.png"}\n'))
    fs.pipe("/job/q.jsonl", b'{"prompt": "a", "image": "x.png"}\n{"prompt": "a", "mask": "gs://y"}')
    write_parquet(tmp_path / "p.parquet", {"prompt": ["a", "b"]})
    fs.pipe("/job/p.parquet", (tmp_path / "p.parquet").read_bytes())
    (line,) = read_prompts("memory://job/p.jsonl.gz")
    assert (line.source, line.spec.image) == ("memory://job/p.jsonl.gz:1", "/x.png")
    relative, absolute = read_prompts("memory://job/q.jsonl")
    assert "image: got x.png, relative to memory://job, expected an absolute" in relative.reason
    assert absolute.spec.mask == "gs://y"
    assert prompts("memory://job/p.parquet") == ["a", "b"]
    with pytest.raises(InputError, match=r"memory://job/none\.txt \(no such file\)"):
        list(read_prompts("memory://job/none.txt"))


def test_a_storage_without_an_answer_is_asked_again(monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.pipe("/flaky/p.txt", b"".join(b"star %d\n" % i for i in range(1000)))
    monkeypatch.setattr(input_files, "BLOCK", 512)
    monkeypatch.setattr(input_files, "FIRST", 0.0)
    file_type = type(fs.open("/flaky/p.txt"))
    failures = itertools.cycle([True, True, False])
    read = file_type.read

    def flaky(self, *size):
        data = read(self, *size)
        if next(failures):
            raise ConnectionError("refused")
        return data

    monkeypatch.setattr(file_type, "read", flaky, raising=False)
    assert prompts("memory://flaky/p.txt") == [f"star {i}" for i in range(1000)]
    monkeypatch.setattr(input_files, "RETRY_SECONDS", -1.0)
    with pytest.raises(InputError, match=r"p\.txt \(refused\), expected a file to read"):
        prompts("memory://flaky/p.txt")


def test_a_check_makes_bad_lines(tmp_path):
    def check(spec):
        if spec.steps is not None:
            raise InputError(f"steps: got {spec.steps}, expected none")

    path = write(tmp_path / "p.jsonl", '{"prompt": "a"}\n{"prompt": "a", "steps": 3}\n')
    (line,) = bad(path, check=check)
    assert line.reason == f"{path}:2: steps: got 3, expected none"


def test_images_of_a_line_have_seeds_and_names():
    line = PromptLine(12, "p:13", PromptSpec(prompt="A star!", seed=5, num_images=2))
    defaults = PromptSpec(prompt="", steps=7, seed=1, num_images=9)
    images = list(line_images(line, defaults))
    assert [(i.number, i.count, i.seed, i.name, i.former_name) for i in images] == [
        (0, 2, 5, "000012_a-star_5", "000012_5"),
        (1, 2, 6, "000012_a-star_6", "000012_6"),
    ]
    assert images[0].spec.steps == 7
    bare = line._replace(spec=PromptSpec(prompt="x"))
    assert [i.seed for i in line_images(bare, defaults)] == list(range(1, 10))
    with pytest.raises(InputError, match="p:13: seed: got 4294967296"):
        list(line_images(bare, PromptSpec(prompt="", seed=2**32 - 1, num_images=2)))


LINES = st.sampled_from(
    [
        *(b"prompt,seed\n", b"prompt\tseed\n", b"a,1\n", b'{"prompt": "a"}\n', b'{"prompt": '),
        *(b'"', b"\n", b"\r", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800"),
        *(b'{"custom_id": "a", "body": {}}\n', b'{"prompt": "a", "loras": [{}]}\n'),
        *(b'[{"a": 1}]\n', b'{"seed": 1e999}\n'),
    ]
)


@hypothesis.settings(max_examples=40)
@given(st.lists(st.one_of(LINES, st.binary(max_size=20)), max_size=8).map(b"".join))
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".txt.gz", ".parquet"])
def test_whatever_is_in_a_file_leads_to_lines_or_a_sentence(tmp_path_factory, suffix, data):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data)
    for packed in (False, True) if suffix.endswith(".gz") else (False,):
        path.write_bytes(gzip.compress(data) if packed else data)
        try:
            lines = list(read_prompts(path))
        except InputError:
            continue
        assert [line.index for line in lines] == list(range(len(lines)))
        assert all(line.reason.startswith(line.source) for line in lines if type(line) is BadLine)


def test_reading_prompts_imports_no_jax(tmp_path):
    path = write(tmp_path / "p.jsonl", json.dumps({"prompt": "a", "loras": ["b:2"], "seed": 3}))
    code = (
        "import sys; from jaxdiff.generation.prompt_stream import read_prompts;"
        f"list(read_prompts({str(path)!r})); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
