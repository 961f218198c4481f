"""Tokenizer folders of every class: which files count, and that they are written back unchanged."""

import pathlib

import pytest

from jaxdiff.checkpoints.tokenizers import (
    CLASSES,
    read_tokenizer,
    tokenizer_digest,
    write_tokenizer,
)
from jaxdiff.core.errors import InputError

T5 = pathlib.Path(__file__).parents[1] / "data/t5_tokenizer"


def fill(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        json_file = name.endswith(".json")
        (folder / name).write_bytes(b"{}" if json_file else (T5 / "spiece.model").read_bytes()[:9])
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_files_of_a_class_are_found_and_written_back(tmp_path, name):
    parts = [part for part in CLASSES[name] if part != "merges.txt"]
    folder = fill(tmp_path / "a", [*parts, "tokenizer_config.json", "README.json"])
    for part in CLASSES[name]:
        if not part.endswith(".model"):
            (folder / part).write_text("{}")
    if name == "GPT2Tokenizer":  # whose files have the names of CLIP's
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    files = read_tokenizer(folder)
    assert files.class_name == name
    assert sorted(files.files) == sorted([*CLASSES[name], "tokenizer_config.json"])
    assert read_tokenizer(folder, class_name=f"{name}Fast").files == files.files
    write_tokenizer(tmp_path / "b", files)
    assert tokenizer_digest(read_tokenizer(tmp_path / "b")) == tokenizer_digest(files)
    for part in files.files:
        assert (tmp_path / "b" / part).read_bytes() == (folder / part).read_bytes()


def test_tokenizer_json_alone_is_of_the_class_in_the_settings(tmp_path):
    fill(tmp_path, ["tokenizer.json", "tokenizer_config.json"])
    assert read_tokenizer(tmp_path).class_name == "CLIPTokenizer"
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5TokenizerFast"}')
    assert read_tokenizer(tmp_path).class_name == "T5TokenizerFast"


def test_missing_files_and_other_classes(tmp_path):
    with pytest.raises(InputError, match=r"got no tokenizer files, expected spiece\.model"):
        read_tokenizer(tmp_path, class_name="T5Tokenizer")
    with pytest.raises(InputError, match="tokenizer: class: got 'LlamaTokenizer', expected one of"):
        read_tokenizer(tmp_path, class_name="LlamaTokenizer")
    (tmp_path / "spiece.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="Git LFS pointer"):
        read_tokenizer(tmp_path)
