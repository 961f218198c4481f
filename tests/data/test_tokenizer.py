"""Tokenizers: one token a caption word, CLIP's files and id order, any text, counted cuts."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from jaxdiff.core.errors import InputError
from jaxdiff.data.sentencepiece import read_sentencepiece
from jaxdiff.data.tokenizer import VOCABULARIES, load_tokenizer, tokenize, truncated
from jaxdiff.data.trained_tokenizer import FILES, save_tokenizer, train_tokenizer
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
    assert type(loaded).__name__ == "CLIPTokenizer"
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


T5 = pathlib.Path(__file__).parent / "t5_tokenizer"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", ",", "##s", "##dish"]


def test_sentencepiece_ids_are_those_of_its_library():
    """spiece.model and expected.json were made by sentencepiece 0.2: a unigram model of captions.

    Its normalisation has a ligature, letters of full width, white space and an ellipsis.
    """
    tokenizer = load_tokenizer(T5, class_name="T5Tokenizer")
    expected = json.loads((T5 / "expected.json").read_text())
    end = tokenizer.convert_tokens_to_ids("</s>")
    assert (tokenizer.pad_token_id, end, tokenizer.unk_token_id) == (0, 1, 2)
    for text, ids, pieces in zip(*expected.values(), strict=True):
        assert tokenizer(text)["input_ids"] == [*ids, end]
        known = [p for p, i in zip(pieces, ids, strict=True) if i != 2]
        assert tokenizer.convert_ids_to_tokens([i for i in ids if i != 2]) == known


def test_sentinels_stand_behind_the_pieces_the_last_one_first():
    tokenizer = load_tokenizer(T5, class_name="T5TokenizerFast")
    count = len(read_sentencepiece(T5 / "spiece.model").pieces)
    ids = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in (99, 1, 0)])
    assert ids == [count, count + 98, count + 99]
    assert len(tokenizer) == count + 100


def test_tokenizer_json_says_the_same(tmp_path):
    first = load_tokenizer(T5, class_name="T5Tokenizer")
    first.model_max_length = 12
    first.save_pretrained(tmp_path)
    assert not (tmp_path / "spiece.model").exists()
    second = load_tokenizer(tmp_path, class_name="T5Tokenizer")
    texts = json.loads((T5 / "expected.json").read_text())["texts"]
    np.testing.assert_array_equal(tokenize(second, texts), tokenize(first, texts))


def test_settings_beside_spiece_model(tmp_path):
    shutil.copy(T5 / "spiece.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 7, "extra_ids": 2}')
    (tmp_path / "added_tokens.json").write_text('{"<b>": 94, "<a>": 93}')
    tokenizer = load_tokenizer(tmp_path, class_name="T5Tokenizer")
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<a>", "<b>"]) == [92, 93, 94]
    ids = tokenize(tokenizer, ["a red circle", ""])
    end = tokenizer.convert_tokens_to_ids("</s>")
    words = tokenizer.convert_tokens_to_ids(["▁a", "▁red", "▁circle"])
    assert ids.tolist() == [[*words, end, 0, 0, 0], [end] + [0] * 6]
    assert truncated(tokenizer, ["a red circle", "a " * 9]) == [0, 3]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no SentencePiece model"),
        (b"\x0a\xff", "no SentencePiece model"),
        (b"PK\x03\x04 and more of another file", "no SentencePiece model"),
        (b"\x12\x02\x18\x02", "not unigram"),
        (b"\x0a\x05\x0a\x01a\x18\x06", "pieces for bytes"),
        (b"\x0a\x07\x0a\x05<unk>\x0a\x02\x18\x02", "no SentencePiece model"),
        (b"\x0a\x09\x0a\x05<unk>\x18\x02", "unknown piece at 0, expected 2"),
    ],
)
def test_other_files_are_no_sentencepiece_model(tmp_path, data, message):
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path, class_name="T5Tokenizer")


def test_a_cut_file_is_one_sentence(tmp_path):
    data = (T5 / "spiece.model").read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "spiece.model").write_bytes(data[:length])
        try:
            load_tokenizer(tmp_path, class_name="T5Tokenizer")
        except InputError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017


@pytest.fixture
def xlm_roberta(tmp_path):
    """A folder with T5's model whose first three pieces are those of XLM-RoBERTa's."""
    data = (T5 / "spiece.model").read_bytes()
    for _ in range(3):  # a tag, a length, and so many bytes
        data = data[2 + data[1] :]
    first = b""
    for text, kind in ((b"<unk>", 2), (b"<s>", 3), (b"</s>", 3)):
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x18" + bytes([kind])
        first += b"\x0a" + bytes([len(piece)]) + piece
    (tmp_path / "sentencepiece.bpe.model").write_bytes(first + data)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 9}')
    return tmp_path


def test_ids_of_xlm_roberta(xlm_roberta):
    """Ids of SentencePiece's library and one, between start and end; the unknown piece's is 3."""
    tokenizer = load_tokenizer(xlm_roberta, class_name="XLMRobertaTokenizerFast")
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 3)
    expected = json.loads((T5 / "expected.json").read_text())
    for text, ids in zip(expected["texts"], expected["ids"], strict=True):
        assert tokenizer(text)["input_ids"] == [0, *(3 if i == 2 else i + 1 for i in ids), 2], text
    pieces = read_sentencepiece(T5 / "spiece.model").pieces
    assert tokenizer.convert_tokens_to_ids("<mask>") == len(tokenizer) - 1 == len(pieces) + 1
    ids = tokenize(tokenizer, ["a red circle", ""])
    words = tokenizer.convert_tokens_to_ids(["▁a", "▁red", "▁circle"])
    assert ids.tolist() == [[0, *words, 2, 1, 1, 1, 1], [0, 2] + [1] * 7]


def test_tokenizer_json_of_xlm_roberta_says_the_same(xlm_roberta):
    first = load_tokenizer(xlm_roberta, class_name="XLMRobertaTokenizer")
    first.save_pretrained(xlm_roberta / "again")
    assert not (xlm_roberta / "again/sentencepiece.bpe.model").exists()
    second = load_tokenizer(xlm_roberta / "again", class_name="XLMRobertaTokenizer")
    texts = json.loads((T5 / "expected.json").read_text())["texts"]
    np.testing.assert_array_equal(tokenize(second, texts), tokenize(first, texts))
    (xlm_roberta / "sentencepiece.bpe.model").write_bytes((T5 / "spiece.model").read_bytes())
    with pytest.raises(InputError, match="unknown piece at 2, expected 0, as XLMRoberta's models"):
        load_tokenizer(xlm_roberta, class_name="XLMRobertaTokenizer")


def test_bert(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    tokenizer = load_tokenizer(tmp_path, class_name="BertTokenizer")
    ids = tokenize(tokenizer, ["A reddish cat", "cats, dog"])
    assert ids.tolist() == [[2, 5, 6, 10, 7, 3, 0, 0], [2, 7, 9, 8, 1, 3, 0, 0]]


def test_missing_files_of_each_class_are_named(tmp_path):
    for name, file in VOCABULARIES.items():
        with pytest.raises(InputError, match=f"expected {file} or tokenizer.json"):
            load_tokenizer(tmp_path, class_name=name)
    with pytest.raises(InputError, match="tokenizer class: got 'XLMTokenizer'"):
        load_tokenizer(tmp_path, class_name="XLMTokenizer")


@pytest.mark.slow
def test_transformers_is_not_imported_before_it_is_needed():
    code = "import sys, jaxdiff.cli.main; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
