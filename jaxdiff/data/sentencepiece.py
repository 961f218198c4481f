"""SentencePiece's model files (Kudo & Richardson 2018): read without its library.

A file is a protocol buffer: fields of a number and a kind, which is a varint, 8 bytes, bytes with
their length, or 4 bytes. Of the whole only the pieces with their scores, the table that normalises
characters, and the kind of model count.
"""

import pathlib
import struct
from collections.abc import Iterator
from typing import NamedTuple

from jaxdiff.core.errors import InputError, os_error_message

# Numbers of fields in sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # of the file
TEXT, SCORE, KIND = 1, 2, 3  # of a piece
MODEL_TYPE = 3  # of the trainer's settings
CHARACTERS = 2  # of the normaliser's settings
UNIGRAM = 1
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # kinds of pieces


class SentencePieceModel(NamedTuple):
    """A unigram model."""

    pieces: list[tuple[str, float]]  # and their logarithmic probabilities, by id
    unknown: int  # id of the piece for characters that no piece has
    characters: bytes  # which characters become which, as the `tokenizers` library reads it


def read_sentencepiece(path: pathlib.Path) -> SentencePieceModel:
    """The model in a file; InputError, which names it, for a file that is none or not unigram."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: got {os_error_message(error)}, expected the file") from None
    try:
        return _parse(data, str(path))
    except InputError:
        raise
    except (LookupError, ValueError, struct.error):
        raise InputError(
            f"{path}: got a file that is no SentencePiece model, expected one"
        ) from None


def _parse(data: bytes, source: str) -> SentencePieceModel:
    pieces: list[tuple[str, float]] = []
    unknown: list[int] = []
    characters, model_type = b"", UNIGRAM
    for number, value in _fields(data):
        if number == PIECES:
            own = dict(_fields(_bytes(value)))
            kind = own.get(KIND, NORMAL)
            if kind not in (NORMAL, UNKNOWN, CONTROL):
                raise InputError(
                    f"{source}: got pieces for bytes or of its user, expected words, one unknown "
                    "piece and control symbols"
                )
            if kind == UNKNOWN:
                unknown.append(len(pieces))
            # What stands for no text is never found by its score.
            score = struct.unpack("<f", _bytes(own[SCORE]))[0] if SCORE in own else 0.0
            pieces.append((_bytes(own[TEXT]).decode("utf-8"), score if kind == NORMAL else 0.0))
        elif number == TRAINER:
            model_type = dict(_fields(_bytes(value))).get(MODEL_TYPE, UNIGRAM)
        elif number == NORMALIZER:
            characters = _bytes(dict(_fields(_bytes(value))).get(CHARACTERS, b""))
    if model_type != UNIGRAM:
        raise InputError(f"{source}: got a model that is not unigram, expected a unigram model")
    if len(unknown) != 1:
        raise ValueError
    return SentencePieceModel(pieces, unknown[0], characters)


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError  # of another kind than the field has
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message; ValueError or IndexError if it is none."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if kind == 2:
            length, position = _varint(data, position)
        else:
            length = {1: 8, 5: 4}.get(kind, -1)
        if length < 0 or not number or position + length > len(data):
            raise ValueError
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where the next field begins."""
    value = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError
