"""CLIP's vocabulary from its merges: the published files, and ids known from them."""

import hashlib
import json

import pytest

from jaxdiff.checkpoints.clip_vocabulary import MERGES, clip_tokenizer, vocabulary
from jaxdiff.checkpoints.tokenizers import read_tokenizer, tokenizer_digest, write_tokenizer
from jaxdiff.data.tokenizer import load_tokenizer, tokenize

# Of merges.txt in the published repositories of Stable Diffusion 1, 2 and XL.
SHA256 = "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


def test_merges_are_the_published_ones():
    assert hashlib.sha256(MERGES.read_bytes()).hexdigest() == SHA256
    assert "Copyright (c) 2021 OpenAI" in (MERGES.parent / "LICENSE").read_text()


def test_ids():
    table = vocabulary()
    assert len(table) == 49408
    assert sorted(table.values()) == list(range(49408))
    assert table["!"] == 0
    assert table["!</w>"] == 256
    assert table["<|startoftext|>"] == 49406
    assert table["<|endoftext|>"] == 49407


@pytest.mark.parametrize(
    ("pad", "text", "expected"),
    [
        (
            "<|endoftext|>",
            "A photo of 3 cats!! naïve  \n tab",
            [49406, 320, 1125, 539, 274, 3989, 748, 1097, 35689, 563, 14724, 49407],
        ),
        ("<|endoftext|>", "cats!!", [49406, 3989, 748, 49407, 49407]),
        ("!", "cats!!", [49406, 3989, 0, 0, 49407, 0, 0]),
    ],
)
def test_texts(tmp_path, pad, text, expected):
    files = clip_tokenizer(pad)
    assert json.loads(files.files["special_tokens_map.json"])["pad_token"] == pad
    write_tokenizer(tmp_path, files)
    (ids,) = tokenize(load_tokenizer(tmp_path), [text])
    assert len(ids) == 77
    assert ids[: len(expected)].tolist() == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_with_a_byte_order_mark_are_the_same_tokenizer(tmp_path, encoding):
    files = clip_tokenizer("!")
    write_tokenizer(tmp_path, files)
    for name in files.files:
        path = tmp_path / name
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    assert tokenizer_digest(read_tokenizer(tmp_path)) == tokenizer_digest(files)
