"""Weights of the tokens of a text whose words are read in the whole, as T5 and BERT do it."""

from collections.abc import Sequence
from typing import Any


def weights_by_offset(
    tokenizer: Any, pieces: Sequence[tuple[str | None, float]]
) -> list[tuple[int, float]]:
    """The ids of the text of all weighted pieces, each with the weight of its last character."""
    text = "".join(piece or "" for piece, _ in pieces)
    weights = [weight for piece, weight in pieces for _ in piece or ""]
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [(token, weights[max(end - 1, 0)]) for token, (_, end) in pairs]
