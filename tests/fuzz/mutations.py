"""Broken and odd versions of files and values, drawn from a seed."""

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Random = np.random.Generator

WORDS = (
    "red",
    "star",
    "(",
    ")",
    "[",
    "]",
    ":",
    "1.3",
    "-1",
    "1e309",
    "nan",
    "|",
    "\\",
    "AND",
    "NOT",
)
WORDS += (
    "BREAK",
    "and",
    "<lora:x:1>",
    "{a|b}",
    "\0",
    "\ufeff",
    "\U0001f600",
    "é",
    "\u200b",
    "中",
    "#",
)
WORDS += (
    "((((",
    "))))",
    ":::",
    ":1.5)",
    "[a:b:0.5]",
    "\t",
    "a" * 400,
    "'",
    '"',
    "<sks>",
    "\u202e",
    "\r",
)
# Values that JSON files hold where another one belongs.
ODD_VALUES = (None, True, False, 0, -1, 1, 7, 2**70, 0.5, -0.5, 1e308, float("nan"), float("inf"))
ODD_VALUES += ("", "x", "../..", "epsilon", [], [0], [1, 2], [[]], ["a", None], {}, {"a": {}})
ODD_TEXT = (b"", b"null", b"[]", b'"x"', b"{", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"{}" * 3)
ODD_TEXT += (
    b"[" * 100_000,
    b'{"a":' * 5000,
    b"\x00" * 64,
    b"NaN",
    b"1" * 5000,
    b'{"a": 1, "a": 2}',
)


def choice(rng: Random, options: Sequence[Any]) -> Any:
    """One of the options as it is, of whatever types they are."""
    return options[int(rng.integers(len(options)))]


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """`data` cut off, with bits flipped, or with bytes added, removed, repeated or zeroed."""
    if not data:
        return rng.bytes(8)
    place = int(rng.integers(len(data)))
    # half of the places are near the beginning, where headers are
    place = place if rng.random() < 0.5 else int(rng.integers(min(len(data), 512)))
    length = int(rng.integers(1, 64))
    kinds: list[Callable[[], bytes]] = [
        lambda: data[:place],
        lambda: (
            data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :]
        ),
        lambda: data[:place] + rng.bytes(length) + data[place + length :],
        lambda: data[:place] + rng.bytes(length) + data[place:],
        lambda: data[:place] + data[place + length :],
        lambda: data[:place] + b"\0" * length + data[place + length :],
        lambda: data + data[:place],
        lambda: data[:place] + data[place : place + length] * 2 + data[place + length :],
    ]
    return choice(rng, kinds)()


def mutate_json(rng: Random, value: Any) -> Any:
    """`value` with one entry at some depth removed, replaced, renamed or added."""
    if isinstance(value, dict) and value:
        key = choice(rng, sorted(value))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
            return value | {key: mutate_json(rng, inner)}
        others = {k: v for k, v in value.items() if k != key}
        odd = choice(rng, ODD_VALUES)
        kinds = (others, value | {key: odd}, others | {f"{key}x": inner}, value | {"odd": odd})
        return choice(rng, kinds)
    if isinstance(value, list) and value:
        place = int(rng.integers(len(value)))
        changed = choice(rng, ([], [mutate_json(rng, value[place])], [choice(rng, ODD_VALUES)]))
        return [*value[:place], *changed, *value[place + 1 :]]
    return choice(rng, ODD_VALUES)


def mutate_json_file(rng: Random, data: bytes) -> bytes:
    """A JSON file with other entries, or one that is none."""
    roll = rng.random()
    if roll < 0.7:
        return json.dumps(mutate_json(rng, json.loads(data))).encode()
    return choice(rng, ODD_TEXT) if roll < 0.85 else mutate_bytes(rng, data)


def text(rng: Random) -> str:
    """Words and signs that prompts and captions may have."""
    words = [choice(rng, WORDS) for _ in range(int(rng.integers(0, 12)))]
    return choice(rng, ("", " ", ", ")).join(words)


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """A safetensors file with another header, other values, or broken."""
    roll = rng.random()
    if roll < 0.3:
        return mutate_bytes(rng, data)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if roll < 0.5:
        return with_header(
            choice(rng, (mutate_json(rng, header), header | {"__metadata__": "x"})), body
        )
    names = sorted(header.keys() - {"__metadata__"})
    name = choice(rng, names)
    entry = header[name]
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    changes: list[Callable[[], dict[str, Any]]] = [
        lambda: {k: v for k, v in header.items() if k != name},
        lambda: header | {f"{name}.more": entry},
        lambda: header | {text(rng) or "x": entry},
        lambda: header | {name: entry | {"shape": shape[::-1]}},
        lambda: header | {name: entry | {"shape": [*shape, 1]}},
        lambda: header | {name: entry | {"shape": [2**31, *shape]}},
        lambda: header | {name: entry | {"shape": [-1, *shape[1:]]}},
        lambda: header | {name: entry | {"data_offsets": [begin, end + 4]}},
        lambda: header | {name: entry | {"data_offsets": [end, begin]}},
        lambda: header | {name: entry | {"data_offsets": [0, 2**62]}},
        lambda: (
            header | {name: entry | {"dtype": choice(rng, ("F16", "F64", "I8", "F8_E4M3", "X", 3))}}
        ),
        lambda: header | {name: header[choice(rng, names)]},
    ]
    if roll < 0.85:
        return with_header(choice(rng, changes)(), body)
    value = struct.pack("<f", choice(rng, (float("nan"), float("inf"), 1e38, 0.0)))
    return with_header(header, body[:begin] + value * ((end - begin) // 4) + body[end:])


def with_header(header: Any, body: bytes) -> bytes:
    """A safetensors file of a header, whatever it is, and the bytes of its tensors."""
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + body
