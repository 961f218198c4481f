import dataclasses

import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.generation.prompt_file import PromptSpec, expand_jobs, read_prompt_file, slug

DEFAULTS = PromptSpec(prompt="", guidance_scale=5.0, seed=3, num_images=2)


def test_json_lines_with_defaults_from_the_command_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a ring"}\n\n{"prompt": "a star", "seed": 9, "guidance_scale": 2}\n'
    )
    lines = read_prompt_file(path)
    jobs = list(expand_jobs(lines, DEFAULTS, numbered=True))
    got = [(j.name, j.spec.prompt, j.seed, j.spec.guidance_scale) for j in jobs]
    assert got == [
        ("000000_a-ring_3", "a ring", 3, 5.0),
        ("000000_a-ring_4", "a ring", 4, 5.0),
        ("000001_a-star_9", "a star", 9, 2),
        ("000001_a-star_10", "a star", 10, 2),
    ]


def test_a_line_ends_at_a_newline_only(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028ring"}\r\n{"prompt": "a\x85star"}', encoding="utf-8")
    assert [line.prompt for _, line in read_prompt_file(path)] == ["a\u2028ring", "a\x85star"]


def test_plain_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a ring\n  a star \n")
    lines = [PromptSpec(prompt="a ring"), PromptSpec(prompt="a star")]
    assert read_prompt_file(path) == [(f"{path}:1", lines[0]), (f"{path}:2", lines[1])]


def test_images_lie_beside_the_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "image": "b/c.png", "mask": "/d.png", "strength": 1}')
    ((_, line),) = read_prompt_file(path)
    assert (line.image, line.mask) == (str(tmp_path / "b" / "c.png"), "/d.png")


def test_a_common_mask_and_strength_are_for_lines_with_an_image():
    defaults = dataclasses.replace(DEFAULTS, num_images=1, mask="m.png", strength=0.5)
    lines = [{}, {"image": "a.png"}, {"image": "a.png", "strength": 1.0}, {"strength": 0.7}]
    jobs = expand_jobs(
        [("", PromptSpec(prompt="x", **line)) for line in lines], defaults, numbered=True
    )
    got = [(j.spec.image, j.spec.mask, j.spec.strength) for j in jobs]
    assert got == [
        (None, None, None),
        ("a.png", "m.png", 0.5),
        ("a.png", "m.png", 1.0),
        (None, None, 0.7),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ', r"prompts\.jsonl:2: got invalid JSON"),
        ('["a"]', r"prompts\.jsonl:1: got a JSON list, expected an object"),
        ('{"seed": 1}', r"prompts\.jsonl:1: got no field 'prompt'"),
        ('{"prompt": null}', r"prompts\.jsonl:1: prompt: got None, expected a string"),
        ('{"prompt": "a", "prompt": "b"}', r"jsonl:1: got the key 'prompt' twice"),
        ('{"prompt": "a", "sede": 1}', r"prompts\.jsonl:1: field: got 'sede', .*'seed'"),
        ("\n", r"got no prompt in .*prompts\.jsonl"),
        ('{"prompt": "a", "seed": "7"}', r"prompts\.jsonl:1: seed: got '7', expected an integer"),
        ('{"prompt": "a", "seed": true}', r"seed: got True, expected an integer"),
        ('{"prompt": "a", "num_images": 2.5}', r"num_images: got 2\.5, expected an integer"),
        ('{"prompt": "a", "guidance_scale": "high"}', r"got 'high', expected a number"),
        ('{"prompt": "a", "image": 3}', r"prompts\.jsonl:1: image: got 3, expected a string"),
        ('{"prompt": "a", "strength": "x"}', r"strength: got 'x', expected a number"),
        ('{"prompt": "a", "negative_prompt": 3}', r"negative_prompt: got 3, expected a string"),
    ],
)
def test_bad_lines_name_the_line(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompt_file(path)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt \(no such file\), expected a file to read"):
        read_prompt_file(tmp_path / "none.txt")


def test_file_that_is_no_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a red star\ncaf\xe9")
    with pytest.raises(InputError, match=r"^/.*prompts\.txt:2: got bytes that are not UTF-8"):
        read_prompt_file(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_of_windows_editors(tmp_path, encoding):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a red star\r\na café\r\n".encode(encoding))
    assert [spec.prompt for _, spec in read_prompt_file(path)] == ["a red star", "a café"]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "a café", "seed": 3}\r\n'.encode(encoding))
    assert [(spec.prompt, spec.seed) for _, spec in read_prompt_file(path)] == [("a café", 3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"seed": -1}, "^p:7: seed: got -1"),
        ({"seed": 2**32 - 1}, "^p:7: seed: got 4294967296"),
        ({"num_images": 0}, "^p:7: num_images: got 0"),
    ],
)
def test_numbers_out_of_range_name_the_line(line, message):
    with pytest.raises(InputError, match=message):
        list(expand_jobs([("p:7", PromptSpec(prompt="x", **line))], DEFAULTS, numbered=True))


def test_slug_is_a_safe_file_name():
    assert slug("A red/circle: ../../etc!") == "a-red-circle-etc"
    assert slug("你好") == "image"


@pytest.mark.parametrize("name", ["prompts.JSON", "p.xlsx"])
def test_files_whose_lines_are_no_prompts(tmp_path, name):
    (tmp_path / name).write_text("prompt\na star\n")
    with pytest.raises(InputError, match=r"^prompts: got .*, expected a file whose name ends in"):
        read_prompt_file(tmp_path / name)


@pytest.mark.parametrize("name", ["p.JSONL", "p.ndjson"])
def test_names_of_files_of_json_lines(tmp_path, name):
    (tmp_path / name).write_text('{"prompt": "a star"}')
    assert [spec.prompt for _, spec in read_prompt_file(tmp_path / name)] == ["a star"]


def test_objects_in_a_file_of_texts_are_refused(tmp_path):
    (tmp_path / "p.txt").write_text('{"prompt": "a star"}')
    with pytest.raises(InputError, match=r"p\.txt:1: got an object, expected it in a \.jsonl file"):
        read_prompt_file(tmp_path / "p.txt")
