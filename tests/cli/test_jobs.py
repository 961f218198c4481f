import pytest

from jaxdiff.cli.jobs import PromptLine, expand, read_lines, slug
from jaxdiff.core.errors import InputError

COMMON = {"negative_prompt": None, "guidance_scale": 5.0}


def test_json_lines_with_defaults_from_the_command_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a ring"}\n\n{"prompt": "a star", "seed": 9, "guidance_scale": 2}\n'
    )
    lines = read_lines(path)
    jobs = list(expand(lines, numbered=True, seed=3, num_images=2, **COMMON))
    got = [(j.name, j.prompt, j.seed, j.guidance_scale) for j in jobs]
    assert got == [
        ("000000_3", "a ring", 3, 5.0),
        ("000000_4", "a ring", 4, 5.0),
        ("000001_9", "a star", 9, 2),
        ("000001_10", "a star", 10, 2),
    ]


def test_a_line_ends_at_a_newline_only(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028ring"}\r\n{"prompt": "a\x85star"}', encoding="utf-8")
    assert [line.prompt for line in read_lines(path)] == ["a\u2028ring", "a\x85star"]


def test_plain_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a ring\n  a star \n")
    assert read_lines(path) == [PromptLine(prompt="a ring"), PromptLine(prompt="a star")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ', r"prompts\.jsonl:2: got invalid JSON"),
        ('["a"]', r"prompts\.jsonl:1: got a JSON list, expected an object"),
        ('{"seed": 1}', r"prompts\.jsonl:1: got no field 'prompt'"),
        ('{"prompt": null}', r"prompts\.jsonl:1: prompt: got None, expected a text"),
        ('{"prompt": "a", "prompt": "b"}', r"jsonl:1: got the key 'prompt' twice"),
        ('{"prompt": "a", "sede": 1}', r"prompts\.jsonl:1: field: got 'sede', .*'seed'"),
        ("\n", r"got no line"),
        ('{"prompt": "a", "seed": "7"}', r"prompts\.jsonl:1: seed: got '7', expected an integer"),
        ('{"prompt": "a", "seed": true}', r"seed: got True, expected an integer"),
        ('{"prompt": "a", "num_images": 2.5}', r"num_images: got 2\.5, expected an integer"),
        ('{"prompt": "a", "guidance_scale": "high"}', r"got 'high', expected a number"),
        ('{"prompt": "a", "negative_prompt": 3}', r"negative_prompt: got 3, expected a text"),
    ],
)
def test_bad_lines_name_the_line(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_lines(path)


def test_missing_file(tmp_path):
    with pytest.raises(
        InputError, match=r"none\.txt \(No such file or directory\), expected a text"
    ):
        read_lines(tmp_path / "none.txt")


def test_file_that_is_no_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"prompts\.txt \(not UTF-8\), expected a text file"):
        read_lines(path)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_outside_32_bits_are_refused(seed):
    with pytest.raises(InputError, match=r"^seed: "):
        list(expand([PromptLine(prompt="x")], numbered=False, seed=seed, num_images=1, **COMMON))


def test_slug_is_a_safe_file_name():
    assert slug("A red/circle: ../../etc!") == "a-red-circle-etc"
    assert slug("你好") == "image"
