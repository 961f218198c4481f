"""Attention syntax and chunks: what stands where, and how heavy."""

import itertools
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from jaxdiff.checkpoints.clip_vocabulary import clip_tokenizer
from jaxdiff.core.errors import InputError
from jaxdiff.data.tokenizer import load_tokenizer, tokenize, truncated
from jaxdiff.pipeline.prompts import (
    MAX_CHUNKS,
    PromptTokenizer,
    chunk_prompt,
    parse_syntax,
)
from jaxdiff.pipeline.tokenizers import tokenizer_of

LETTERS = "abcdefgh"


@pytest.fixture(scope="module")
def tokenizer():
    tokens = ["!", *LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=6)


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return PromptTokenizer(tokenizer)


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
    got = parse_syntax(prompt)
    assert [text for text, _ in got] == [text for text, _ in pieces]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in pieces])


@given(st.text(alphabet="ab()[]:.1\\ BREAK", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_has_pieces_and_loses_no_letter(prompt):
    try:
        pieces = parse_syntax(prompt)
    except InputError as error:
        assert "weight" in str(error) or "prompt editing" in str(error)  # noqa: PT017
        return
    assert all(math.isfinite(weight) for _, weight in pieces)
    said = "".join(text or "" for text, _ in pieces)
    assert said.count("a") == prompt.count("a")
    assert said.count("b") == prompt.count("b")


def test_an_absurd_weight_is_an_error():
    with pytest.raises(InputError, match=r"^prompt: got weight 1000 for 'a', expected at most 100"):
        parse_syntax("(a:1000)")


@pytest.mark.parametrize("text", ["", "a", "ab c", "abcd", "a! b"])
def test_a_plain_prompt_is_what_the_tokenizer_says(vocabulary, tokenizer, text):
    tokens = chunk_prompt(vocabulary, text)
    np.testing.assert_array_equal(tokens.ids, tokenize(tokenizer, [text]))
    np.testing.assert_array_equal(tokens.weights, np.ones((1, 6)))


def test_a_long_prompt_goes_on_in_the_next_chunk(vocabulary):
    """Letters one by one: four to a chunk between start (17) and end (18)."""
    tokens = chunk_prompt(vocabulary, "abcd (ef:1.5)")
    np.testing.assert_array_equal(tokens.ids, [[17, 1, 2, 3, 12, 18], [17, 5, 14, 18, 18, 18]])
    np.testing.assert_array_equal(tokens.weights, [[1] * 6, [1, 1.5, 1.5, 1, 1, 1]])
    assert tokens.num_truncated == 0


def test_break_begins_a_chunk(vocabulary):
    tokens = chunk_prompt(vocabulary, "a BREAK b")
    np.testing.assert_array_equal(tokens.ids[:, 1], [9, 10])


def test_without_syntax_brackets_are_characters(vocabulary, tokenizer):
    tokens = chunk_prompt(vocabulary, "(a:2) BREAK", syntax=False)
    np.testing.assert_array_equal(tokens.ids[:1], tokenize(tokenizer, ["(a:2) BREAK"]))
    assert (tokens.weights == 1).all()


def test_what_is_cut_is_counted(vocabulary):
    tokens = chunk_prompt(vocabulary, "a " * (4 * MAX_CHUNKS + 3))
    assert (len(tokens.ids), tokens.num_truncated) == (MAX_CHUNKS, 3)


@pytest.fixture(scope="module")
def clip():
    """The vocabulary of Stable Diffusion: 75 tokens of text to a chunk, "a" and "," one each."""
    return PromptTokenizer(tokenizer_of(clip_tokenizer("!")))


def in_chunks(clip, words):
    """The words of each chunk of a prompt."""
    spelled = {clip.ids(word)[0]: word for word in ("a", "b", ",")}
    end = clip.tokenizer.eos_token_id
    rows = [row[1 : row.index(end)] for row in chunk_prompt(clip, " ".join(words)).ids.tolist()]
    return [[spelled[token] for token in row] for row in rows]


def with_commas(length, *places):
    return ["," if i in places else "a" for i in range(length)]


@pytest.mark.parametrize(
    ("words", "lengths"),
    [
        (with_commas(80), [75, 5]),
        (with_commas(80, 55), [56, 24]),  # the earliest of the last 20
        (with_commas(80, 54), [75, 5]),
        (with_commas(80, 73), [74, 6]),
        (with_commas(80, 74), [75, 5]),
        (with_commas(80, 56, 60, 62), [63, 17]),  # the last one counts
        (with_commas(80, 60, 75), [75, 5]),  # a comma itself is no phrase that would be cut
        (with_commas(75, 60), [75]),  # a prompt of one chunk stays as it is
        (with_commas(160, 60, 130), [61, 70, 29]),
        (with_commas(160, 60, 100), [61, 75, 24]),
    ],
)
def test_a_full_chunk_ends_at_a_late_comma(clip, words, lengths):
    chunks = in_chunks(clip, words)
    assert [len(chunk) for chunk in chunks] == lengths
    assert list(itertools.chain(*chunks)) == words


def test_a_weight_moves_with_its_token(clip):
    prompt = "a " * 70 + ", (b:1.5) a a a a"
    tokens = chunk_prompt(clip, prompt)
    first, second = tokens.ids.tolist()
    b = clip.ids("b")[0]
    assert b not in first
    assert second[1] == b
    assert (tokens.weights != 1).sum() == 1
    assert tokens.weights[1, 1] == 1.5


@given(st.lists(st.sampled_from(["a"] * 9 + [","]), min_size=70, max_size=320))
@settings(max_examples=60, deadline=None)
def test_where_chunks_end(clip, words):
    """Said of the outcome: nothing is lost, and every chunk but the last ends for a reason."""
    chunks = in_chunks(clip, words)
    assert list(itertools.chain(*chunks)) == words
    for chunk, following in itertools.pairwise(chunks):
        if len(chunk) == 75:
            assert "," in (chunk[-1], following[0]) or "," not in chunk[-20:]
        else:
            assert chunk[-1] == ","
            assert 75 - 20 < len(chunk) < 75
            assert "," not in following[: 75 - len(chunk) + 1]
    assert len(chunks[-1]) <= 75


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
    vocabulary = PromptTokenizer(tokenizer_of(clip_tokenizer(pad)))
    for text in ODD:
        want = tokenize(vocabulary.tokenizer, [text])
        np.testing.assert_array_equal(chunk_prompt(vocabulary, text, syntax=False).ids, want)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat <lora:style:0.8>", r"'<lora:style:0.8>', .* --lora style.safetensors:0.8"),
        ("a <lora:style>", "'<lora:style>', expected a LoRA as an option"),
        ("a <lyco:style:1>", "'<lyco:style:1>', expected a LoRA as an option"),
        ("a <hypernet:x:1>", "'<hypernet:x:1>', expected it left out"),
        ("a [cat:dog:0.5]", r"'\[cat:dog:0.5\]', expected no prompt editing"),
        ("a [cat::12]", "expected no prompt editing"),
        ("a [dog: .5 ]", "expected no prompt editing"),
        ("a [big [cat]:(dog:1.2):0.5]", "expected no prompt editing"),
        ("a [cat|dog|]", r"'\[cat\|dog\|\]', expected no alternation"),
        ("a [[cat]|dog]", "expected no alternation"),
        ("a cat AND_PERP a dog", "AND_PERP, expected AND"),
    ],
)
def test_syntax_that_is_not_read_is_never_taken_for_text(prompt, message):
    with pytest.raises(InputError, match=f"^prompt: got .*{message}"):
        parse_syntax(prompt)


@pytest.mark.parametrize("prompt", ["a | b", "<3", r"a \[cat|dog\]", "[a:b]", "[3]", "a: 0.5"])
def test_what_only_looks_like_it_is_text(prompt):
    assert parse_syntax(prompt)


T5 = pathlib.Path(__file__).parents[1] / "data/t5_tokenizer"


@pytest.fixture(scope="module")
def t5():
    """A unigram vocabulary; ids are pieces, then the end."""
    tokenizer = load_tokenizer(T5, class_name="T5Tokenizer")
    tokenizer.model_max_length = 12
    return PromptTokenizer(tokenizer)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", ",", "##s", "##dish"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = load_tokenizer(folder, class_name="BertTokenizer")
    tokenizer.model_max_length = 12
    return PromptTokenizer(tokenizer)


def weight_of(vocabulary, tokens, piece):
    """The weights of a piece in the only chunk."""
    (ids,), (weights,) = tokens.ids.tolist(), tokens.weights.tolist()
    token = vocabulary.tokenizer.convert_tokens_to_ids(piece)
    return [w for i, w in zip(ids, weights, strict=True) if i == token]


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a (red:1.2) circle", "a red circle"),
        ("(a red:1.2), blue", "a red, blue"),
        ("a (red)(dish:0.5)", "a reddish"),
        ("a(, blue:2)", "a, blue"),
        ("[a] (red)", "a red"),
        ("a BREAK red", "a   red"),
        ("", ""),
    ],
)
def test_weights_do_not_change_the_ids_of_t5_and_bert(t5, bert, prompt, plain):
    for vocabulary in (t5, bert):
        got = chunk_prompt(vocabulary, prompt, max_chunks=1)
        np.testing.assert_array_equal(got.ids, tokenize(vocabulary.tokenizer, [plain]))


def test_weights_of_words_and_their_parts(t5, bert):
    tokens = chunk_prompt(t5, "a (red:1.5) circle, (blue:0.5)", max_chunks=1)
    assert weight_of(t5, tokens, "▁red") == [1.5]
    assert weight_of(t5, tokens, "▁circle") == [1]
    assert weight_of(t5, tokens, "▁blue") == [0.5]
    assert weight_of(t5, tokens, "</s>") == [1]
    tokens = chunk_prompt(bert, "a red(dish:2) cat(s:0.5)", max_chunks=1)
    assert weight_of(bert, tokens, "red") == [1]
    assert weight_of(bert, tokens, "##dish") == [2]
    assert weight_of(bert, tokens, "##s") == [0.5]
    # a token across a bracket weighs as its end does
    assert weight_of(t5, chunk_prompt(t5, "r(ed:3) circle", max_chunks=1), "▁red") == [3]


def test_one_chunk_is_cut_where_it_is_full(t5):
    """As the tokenizer cuts it: no comma counts where no second chunk follows."""
    text = "a red, blue " + "a " * 12
    tokens = chunk_prompt(t5, text, max_chunks=1)
    np.testing.assert_array_equal(tokens.ids, tokenize(t5.tokenizer, [text]))
    assert tokens.num_truncated == truncated(t5.tokenizer, [text])[0] > 0
    several = chunk_prompt(t5, text)
    assert several.ids[0, 2] == t5.comma
    assert several.ids[0, 3] == t5.special[0]


@given(st.text(alphabet="aredbl,. ", max_size=30))
@settings(max_examples=100, deadline=None)
def test_a_plain_prompt_is_what_any_tokenizer_says(t5, bert, text):
    for vocabulary in (t5, bert):
        got = chunk_prompt(vocabulary, text, syntax=False, max_chunks=1)
        np.testing.assert_array_equal(got.ids, tokenize(vocabulary.tokenizer, [text]))
