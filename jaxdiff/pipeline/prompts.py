"""Prompts as chunks of weighted tokens: attention syntax, AND, and texts of any length.

The syntax is that of the AUTOMATIC1111 web UI: `(word)` weighs 1.1 times, `[word]` 1 / 1.1 times,
`(word:1.3)` 1.3 times, all of them nest, a backslash makes a bracket a character, and the word
BREAK begins a new chunk. A chunk is what the text encoder reads at once: start, up to n - 2 tokens
of text, end, padding. Where a full chunk has a comma among its last tokens, what stands behind it
goes to the next chunk, so that a phrase is not cut in two.

AND joins several prompts for one image (composable diffusion, 2206.01714). `a cat AND a dog:0.5 AND
NOT snow` asks for a cat, half as much for a dog, and for no snow: each part has its own stream and
a weight, 1 if it has no number and negative after NOT.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, Int, NDArray
from jaxdiff.pipeline.token_weights import weights_by_offset

EMPHASIS = 1.1  # of a pair of brackets without a number
MAX_WEIGHT = 100.0
MAX_CHUNKS = 16
BACKTRACK = 20  # tokens at the end of a full chunk among which a comma counts
MAX_PARTS = 8  # of a prompt, joined by AND
SUFFIX_FIELD = "end_of_word_suffix"  # of byte-pair models of the `tokenizers` library

_MARKS = re.compile(
    r"\\[()\[\]\\]"  # an escaped bracket or backslash
    r"|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)"  # a weight and the end of its bracket
    r"|[()\[\]]"
    r"|\bBREAK\b"
    r"|[^\\()\[\]:B]+|[\\:B]"
)


# What A1111's web UI reads and this does not: it must not be taken for text.
_EXTRA_NETWORK = re.compile(r"<(lora|lyco|hypernet):([^:<>]*)(?::([^<>]*))?>")
_STEP = re.compile(r":\s*(?:\d+\.?\d*|\.\d+)\s*$")  # the end of [cat:dog:0.5]
_PERPENDICULAR = re.compile(r"\bAND_[A-Z]+\b")  # of extensions

_WEIGHT = re.compile(r"\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")
_NOT = re.compile(r"^\s*NOT\b")


class PromptTokenizer:
    """A tokenizer, some of whose tokens may stand for several ids (textual inversion)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.expansions: dict[int, list[int]] = {}
        # what stands around a text: an end, behind a start if there is one
        self.special: list[int] = tokenizer("")["input_ids"]
        commas = tokenizer.convert_tokens_to_ids([",</w>", ","])
        known = [comma for comma in commas if comma not in (None, tokenizer.unk_token_id)]
        self.comma = known[0] if known else None
        # Whether tokens show where a word ends, as CLIP's do, rather than where it begins.
        self.marks_ends = bool(getattr(tokenizer.backend_tokenizer.model, SUFFIX_FIELD, None))

    def ids(self, text: str) -> list[int]:
        """The ids of `text`, without start and end."""
        plain = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [part for token in plain for part in self.expansions.get(token, [token])]

    def weighted_ids(self, pieces: Sequence["WeightedText"]) -> list[tuple[int, float]]:
        """The ids of a text in pieces, without start and end, and their weights.

        Of CLIP's vocabulary pieces are read one by one, as A1111 does. Others write a word that
        begins a text and one that goes on differently: the whole is read, and a token weighs as
        its last character does.
        """
        if self.marks_ends:
            return [(token, weight) for text, weight in pieces for token in self.ids(text or "")]
        tokens = weights_by_offset(self.tokenizer, pieces)
        return [(part, w) for t, w in tokens for part in self.expansions.get(t, [t])]


class WeightedText(NamedTuple):
    """A run of text with one weight; text None is a break between chunks."""

    text: str | None
    weight: float


class Tokens(NamedTuple):
    """One prompt in chunks, and how many of its tokens found no room."""

    ids: Int[NDArray, "m n"]
    weights: Float[NDArray, "m n"]
    num_truncated: int


class SubPrompt(NamedTuple):
    """One of the prompts of an image."""

    text: str
    weight: float


def split_and(prompt: str, *, syntax: bool = True) -> list[SubPrompt]:
    """The prompts that AND joins in `prompt`; a single one is taken as it is.

    Raises InputError for too many, and for weights beyond MAX_WEIGHT.
    """
    texts = re.split(r"\bAND\b", prompt) if syntax else [prompt]
    if len(texts) == 1:
        return [SubPrompt(prompt, 1.0)]
    if len(texts) > MAX_PARTS:
        raise InputError(
            f"prompt: got {len(texts)} prompts joined by AND, expected at most {MAX_PARTS}"
        )
    return [_part(text) for text in texts]


def _part(text: str) -> SubPrompt:
    number = _WEIGHT.search(text)
    weight = _checked(1.0 if number is None else float(number.group(1)), text)
    words, negated = _NOT.subn("", _WEIGHT.sub("", text))
    return SubPrompt(words.strip(), -weight if negated else weight)


def _checked(weight: float, text: str | None) -> float:
    if abs(weight) > MAX_WEIGHT:
        raise InputError(
            f"prompt: got weight {weight:g} for {text!r:.60}, expected at most {MAX_WEIGHT:g}"
        )
    return weight


def parse_syntax(prompt: str) -> list[WeightedText]:
    """`prompt` by weight; brackets that never close weigh as those that close at the end.

    A closing bracket without its opening one is a character. InputError for a weight beyond
    MAX_WEIGHT, and for syntax of A1111 that is not read: editing, alternation, extra networks.
    """
    _check_unread(prompt)
    pieces: list[WeightedText] = []
    opened: list[tuple[str, int]] = []  # brackets, and where their content begins

    def close(bracket: str, factor: float) -> bool:
        """Weigh what is in the bracket opened last; False if it is another or none."""
        if not opened or opened[-1][0] != bracket:
            return False
        _, first = opened.pop()
        pieces[first:] = [WeightedText(text, weight * factor) for text, weight in pieces[first:]]
        return True

    for mark in _MARKS.findall(prompt):
        if mark in ("(", "["):
            opened.append((mark, len(pieces)))
        elif mark == "BREAK":
            pieces.append(WeightedText(None, 1.0))
        elif mark[-1] in ")]" and mark[0] != "\\" and close(*_closing(mark)):
            continue
        else:
            plain = mark[1:] if len(mark) == 2 and mark[0] == "\\" else mark
            pieces.append(WeightedText(plain, 1.0))
    while opened:
        close(*_closing(")" if opened[-1][0] == "(" else "]"))
    for text, weight in pieces:
        _checked(weight, text)
    return _joined(pieces)


def _check_unread(prompt: str) -> None:
    """InputError for syntax of A1111 that would be taken for text."""
    if network := _EXTRA_NETWORK.search(prompt):
        kind, name, scale = network.groups()
        instead = f"a LoRA as an option, such as --lora {name or 'FILE'}.safetensors:{scale or 1}"
        wanted = instead if kind != "hypernet" else "it left out: there are no hypernetworks"
        raise InputError(f"prompt: got {network[0]!r:.60}, expected {wanted}")
    if joined := _PERPENDICULAR.search(prompt):
        raise InputError(f"prompt: got {joined[0]}, expected AND (and AND NOT)")
    for content in _bracket_contents(prompt):
        alternates = re.search(r"(?<!\\)\|", content)
        if alternates or _STEP.search(content):
            name = "alternation" if alternates else "prompt editing"
            raise InputError(
                f"prompt: got {f'[{content}]'!r:.60}, expected no {name}: a prompt is the same in "
                "all steps (a backslash makes a bracket a character)"
            )


def _bracket_contents(prompt: str) -> Iterator[str]:
    """What stands in each pair of square brackets, without what is in further ones inside."""
    opened: list[str] = []
    for mark in re.findall(r"\\.|[\[\]]|[^\\\[\]]+|\\", prompt, re.DOTALL):
        if mark == "[":
            opened.append("")
        elif mark == "]":
            if opened:
                yield opened.pop()
        elif opened:
            opened[-1] += mark


def _closing(mark: str) -> tuple[str, float]:
    """The bracket that `mark` closes, and the factor of what is inside."""
    if mark == "]":
        return "[", 1 / EMPHASIS
    return "(", EMPHASIS if mark == ")" else float(mark[1:-1])


def _joined(pieces: Sequence[WeightedText]) -> list[WeightedText]:
    """Neighbours of one weight as one piece, so that the tokenizer sees whole words."""
    joined: list[WeightedText] = []
    for text, weight in pieces:
        last = joined[-1] if joined else None
        if last and last.text is not None and text is not None and last.weight == weight:
            joined[-1] = WeightedText(last.text + text, weight)
        else:
            joined.append(WeightedText(text, weight))
    return joined


def chunk_prompt(
    tokenizer: PromptTokenizer,
    prompt: str,
    *,
    syntax: bool = True,
    max_chunks: int = MAX_CHUNKS,
    length: int | None = None,
) -> Tokens:
    """The chunks of `prompt`, one at least; without `syntax` every character stands for itself.

    A prompt without brackets that fits one chunk gets exactly the ids that the tokenizer gives. Of
    one chunk at most, BREAK is a space, and a longer prompt is cut where the chunk is full. A chunk
    has `length` tokens; None: as many as the tokenizer says.
    """
    n: int = length or tokenizer.tokenizer.model_max_length
    room = n - len(tokenizer.special)
    chunks: list[tuple[list[int], list[float]]] = [([], [])]
    pieces = parse_syntax(prompt) if syntax else [WeightedText(prompt, 1.0)]
    if max_chunks == 1:
        pieces = _joined([WeightedText(" " if t is None else t, weight) for t, weight in pieces])
    for i, part in enumerate(_between_breaks(pieces)):
        if i:
            chunks.append(([], []))
        for token, weight in tokenizer.weighted_ids(part):
            ids, weights = chunks[-1]
            if len(ids) == room:
                at_comma = token != tokenizer.comma and max_chunks > 1
                stays = _up_to(tokenizer.comma, ids) if at_comma else room
                chunks.append((ids[stays:], weights[stays:]))
                del ids[stays:], weights[stays:]
            chunks[-1][0].append(token)
            chunks[-1][1].append(weight)
    num_truncated = sum(len(ids) for ids, _ in chunks[max_chunks:])
    framed = [_framed(tokenizer, *chunk, n) for chunk in chunks[:max_chunks]]
    ids, weights = (np.stack(column) for column in zip(*framed, strict=True))
    return Tokens(ids, weights, num_truncated)


def _between_breaks(pieces: Sequence[WeightedText]) -> list[list[WeightedText]]:
    """The pieces before, between and after breaks."""
    parts: list[list[WeightedText]] = [[]]
    for piece in pieces:
        if piece.text is None:
            parts.append([])
        else:
            parts[-1].append(piece)
    return parts


def _up_to(comma: int | None, ids: Sequence[int]) -> int:
    """How many tokens of a full chunk stay in it: up to the last of its late commas, or all."""
    late = ids[-BACKTRACK:]
    return len(ids) - (late[::-1].index(comma) if comma in late else 0)


def _framed(
    tokenizer: PromptTokenizer, ids: list[int], weights: list[float], n: int
) -> tuple[NDArray, NDArray]:
    """Start, `ids`, end, padding: n tokens; what is not text weighs 1."""
    start, end = tokenizer.special[:-1], tokenizer.special[-1:]
    pad = tokenizer.tokenizer.pad_token_id
    whole, heavy = [*start, *ids, *end], np.ones(n, np.float32)
    heavy[len(start) : len(start) + len(ids)] = weights
    return np.array([*whole, *[pad] * (n - len(whole))], np.int32), heavy


def pad_chunks(tokens: Tokens, chunks: int, empty: Tokens) -> Tokens:
    """`tokens` in at least so many chunks, the `empty` text's behind its own."""
    missing = max(0, chunks - len(tokens.ids))
    return Tokens(
        ids=np.concatenate([tokens.ids, np.repeat(empty.ids[:1], missing, axis=0)]),
        weights=np.concatenate([tokens.weights, np.repeat(empty.weights[:1], missing, axis=0)]),
        num_truncated=tokens.num_truncated,
    )
