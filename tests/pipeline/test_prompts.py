"""Attention syntax and chunks: what stands where, and how heavy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from jaxdiff.checkpoints.clip_vocabulary import clip_tokenizer
from jaxdiff.checkpoints.tokenizers import read_tokenizer
from jaxdiff.core.errors import InputError
from jaxdiff.data.tokenizer import tokenize
from jaxdiff.models.build import abstract
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.pipeline.prompts import MAX_CHUNKS, chunks_of, parse
from jaxdiff.pipeline.vocabulary import Vocabulary

LETTERS = "abcdefgh"


@pytest.fixture(scope="module")
def tokenizer():
    tokens = ["!", *LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=6)


@pytest.fixture(scope="module")
def vocabulary(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    config = CLIPTextConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    return Vocabulary(read_tokenizer(folder), abstract(CLIPTextModel, config))


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (cat)", [("a ", 1), ("cat", 1.1)]),
        ("((cat))", [("cat", 1.1**2)]),
        ("[cat] b", [("cat", 1 / 1.1), (" b", 1)]),
        ("a (cat:1.3) b", [("a ", 1), ("cat", 1.3), (" b", 1)]),
        ("(a (b:2):1.5)", [("a ", 1.5), ("b", 3)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("(a:-1)", [("a", -1)]),
        ("[a (b)]", [("a ", 1 / 1.1), ("b", 1)]),
        (r"a \(b\) \[c\] \\", [("a (b) [c] \\", 1)]),
        (r"a\b", [(r"a\b", 1)]),
        ("a BREAK b", [("a ", 1), (None, 1), (" b", 1)]),
        ("BREAKFAST aBREAK", [("BREAKFAST aBREAK", 1)]),
        # what does not match
        ("(a", [("a", 1.1)]),
        ("[a (b", [("a ", 1 / 1.1), ("b", 1)]),
        ("a) b] c", [("a) b] c", 1)]),
        ("(a]", [("a]", 1.1)]),
        ("a:1.3) b", [("a:1.3) b", 1)]),
        ("ratio 16:9, (b:c)", [("ratio 16:9, ", 1), ("b:c", 1.1)]),
        ("", []),
        ("()", []),
    ],
)
def test_pieces(prompt, pieces):
    got = parse(prompt)
    assert [text for text, _ in got] == [text for text, _ in pieces]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in pieces])


@given(st.text(alphabet="ab()[]:.1\\ BREAK", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_has_pieces_and_loses_no_letter(prompt):
    try:
        pieces = parse(prompt)
    except InputError as error:
        assert "weight" in str(error)  # noqa: PT017
        return
    assert all(math.isfinite(weight) for _, weight in pieces)
    said = "".join(text or "" for text, _ in pieces)
    assert said.count("a") == prompt.count("a")
    assert said.count("b") == prompt.count("b")


def test_an_absurd_weight_is_an_error():
    with pytest.raises(InputError, match=r"^prompt: got weight 1000 for 'a', expected at most 100"):
        parse("(a:1000)")


@pytest.mark.parametrize("text", ["", "a", "ab c", "abcd", "a! b"])
def test_a_plain_prompt_is_what_the_tokenizer_says(vocabulary, tokenizer, text):
    tokens = chunks_of(vocabulary, text)
    np.testing.assert_array_equal(tokens.ids, tokenize(tokenizer, [text]))
    np.testing.assert_array_equal(tokens.weights, np.ones((1, 6)))


def test_a_long_prompt_goes_on_in_the_next_chunk(vocabulary):
    """Letters one by one: four to a chunk between start (17) and end (18)."""
    tokens = chunks_of(vocabulary, "abcd (ef:1.5)")
    np.testing.assert_array_equal(tokens.ids, [[17, 1, 2, 3, 12, 18], [17, 5, 14, 18, 18, 18]])
    np.testing.assert_array_equal(tokens.weights, [[1] * 6, [1, 1.5, 1.5, 1, 1, 1]])
    assert tokens.cut == 0


def test_break_begins_a_chunk(vocabulary):
    tokens = chunks_of(vocabulary, "a BREAK b")
    np.testing.assert_array_equal(tokens.ids[:, 1], [9, 10])


def test_without_syntax_brackets_are_characters(vocabulary, tokenizer):
    tokens = chunks_of(vocabulary, "(a:2) BREAK", syntax=False)
    np.testing.assert_array_equal(tokens.ids[:1], tokenize(tokenizer, ["(a:2) BREAK"]))
    assert (tokens.weights == 1).all()


def test_what_is_cut_is_counted(vocabulary):
    tokens = chunks_of(vocabulary, "a " * (4 * MAX_CHUNKS + 3))
    assert (len(tokens.ids), tokens.cut) == (MAX_CHUNKS, 3)


ODD = [
    "",
    "!",
    "cats!! 😀 naïve  \n tab",
    "Ünïcödé — “quotes” … ellipsis",
    "a\u0000b \u200b zero width",
    "日本語のプロンプト",
    "hello_world CamelCase 3.14159 $5.00 50% #tag @user",
    "<|endoftext|> in the middle <|startoftext|>",
    "don't can't won't it's",
    "?!?!?! ... --- ,,, !!! !",
    "photo " * 75,
]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_odd_prompts_are_what_the_tokenizer_of_stable_diffusion_says(pad):
    config = CLIPTextConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    vocabulary = Vocabulary(clip_tokenizer(pad), abstract(CLIPTextModel, config))
    for text in ODD:
        want = tokenize(vocabulary.tokenizer, [text])
        np.testing.assert_array_equal(chunks_of(vocabulary, text, syntax=False).ids, want)
