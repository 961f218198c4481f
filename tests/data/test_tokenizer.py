"""Tokenizers: one token a caption word, CLIP's files and id order, any text, counted cuts."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from jaxdiff.core.errors import InputError
from jaxdiff.data.tokenizer import (
    FILES,
    load_tokenizer,
    save_tokenizer,
    tokenize,
    train_tokenizer,
    truncated,
)
from jaxdiff.scenes.source import SceneSource


@pytest.fixture(scope="module")
def captions():
    return [SceneSource(seed=0).example(i)[2] for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer(captions):
    return train_tokenizer(captions)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, path)
    return path


def test_every_caption_word_is_one_token(tokenizer, captions):
    words = sorted({word for text in captions for word in text.split()})
    assert [tokenizer.tokenize(word) for word in words] == [[f"{word}</w>"] for word in words]


def test_ids_come_in_the_order_of_clip(tokenizer):
    assert tokenizer.eos_token_id == len(tokenizer) - 1 != 2
    assert tokenizer.bos_token_id == len(tokenizer) - 2
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.convert_tokens_to_ids("a</w>") == 320  # as in OpenAI's vocabulary
    assert tokenizer.convert_tokens_to_ids("!") == 0


def test_rows_are_start_text_end_padding(tokenizer):
    ids = tokenize(tokenizer, ["a red circle", ""])
    assert ids.dtype == np.int32
    assert ids.shape == (2, 32)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    words = tokenizer.convert_tokens_to_ids(["a</w>", "red</w>", "circle</w>"])
    assert ids[0].tolist() == [start, *words, end] + [end] * 27
    assert ids[1].tolist() == [start] + [end] * 31


def test_case_and_white_space_do_not_matter(tokenizer):
    a, b = tokenize(tokenizer, ["A  Small RED\ncircle", "a small red circle"])
    np.testing.assert_array_equal(a, b)


def test_any_text_has_tokens(tokenizer):
    text = "naïve cats!! 猫 🙂 <3"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")


def test_cut_tokens_are_counted(tokenizer, captions):
    long = " ".join(["red"] * 40)
    assert truncated(tokenizer, ["a red circle", long]) == [0, 10]
    row = tokenize(tokenizer, [long])[0]
    assert row[-1] == tokenizer.eos_token_id != row[-2]
    assert truncated(tokenizer, captions) == [0] * len(captions)


def test_training_is_deterministic(tokenizer, captions):
    assert train_tokenizer(captions).get_vocab() == tokenizer.get_vocab()


def test_a_smaller_vocabulary_still_encodes(tokenizer, captions):
    small = train_tokenizer(captions, vocab_size=520, max_length=77)
    assert len(small) == 520
    assert tokenize(small, ["a red circle"]).shape == (1, 77)
    with pytest.raises(InputError, match="vocab_size"):
        train_tokenizer(captions, vocab_size=100)


@pytest.mark.parametrize(
    "load", [load_tokenizer, CLIPTokenizer.from_pretrained, AutoTokenizer.from_pretrained]
)
def test_saved_files_load_as_an_ordinary_clip_tokenizer(tokenizer, captions, folder, load):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    loaded = load(folder)
    assert isinstance(loaded, CLIPTokenizer)
    assert loaded.model_max_length == 32
    texts = [*captions[:50], "", "naïve cats!! 猫"]
    np.testing.assert_array_equal(tokenize(loaded, texts), tokenize(tokenizer, texts))


def test_saving_again_writes_the_same_bytes(folder, tmp_path):
    save_tokenizer(load_tokenizer(folder), tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert (folder / "merges.txt").read_text().startswith("#version: 0.2\n")
    assert (
        json.loads((folder / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"
    )


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_importing_says_nothing():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS_")}
    code = (
        "import os, jaxdiff.data.tokenizer; assert not [k for k in os.environ if 'ADVISORY' in k]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""


def test_files_that_are_no_tokenizer_are_one_sentence(tmp_path):
    save_tokenizer(train_tokenizer(["a red star"], vocab_size=530, max_length=8), tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\n\xff\xfe\n")
    with pytest.raises(InputError, match=f"^{tmp_path}: got files that are no tokenizer .*UTF-8"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_unknown_token_is_refused(tmp_path):
    """Of which transformers would ask itself for ever."""
    save_tokenizer(train_tokenizer(["a red star"], vocab_size=530, max_length=8), tmp_path)
    path = tmp_path / "special_tokens_map.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unk_token": ""}))
    with pytest.raises(InputError, match="got files that are no tokenizer"):
        load_tokenizer(tmp_path)
