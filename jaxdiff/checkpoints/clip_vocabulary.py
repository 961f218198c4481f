"""The tokenizer of CLIP, which single files of Stable Diffusion leave out.

Its merges are OpenAI's (assets/clip, MIT licence beside it); the vocabulary follows from them: 256
byte symbols, the same at the end of a word, each merged pair in order, and two special tokens.
"""

import functools
import json
import pathlib

from jaxdiff.checkpoints.tokenizers import TokenizerFiles

MERGES = pathlib.Path(__file__).parents[1] / "assets" / "clip" / "merges.txt"
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77  # tokens of a prompt, start and end counted in


def byte_symbols() -> list[str]:
    """A printable character for each byte, in the order of the vocabulary (GPT-2's scheme).

    Bytes that print as themselves come first; the others take the characters from 256 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = 256 - len(plain)
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(others)]


@functools.cache
def vocabulary() -> dict[str, int]:
    """Token -> id, 49,408 of them."""
    pairs = MERGES.read_text(encoding="utf-8").splitlines()[1:]
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *(p.replace(" ", "") for p in pairs)]
    return {token: i for i, token in enumerate([*tokens, START, END])}


def clip_tokenizer(pad: str) -> TokenizerFiles:
    """CLIP's tokenizer as the files of a CLIPTokenizer that fills short prompts with `pad`.

    Stable Diffusion 1 and the first encoder of XL pad with the end token, OpenCLIP's with "!".
    """
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH}
    settings |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    return TokenizerFiles(
        class_name="CLIPTokenizer",
        files={
            "vocab.json": _json(vocabulary()),
            "merges.txt": MERGES.read_bytes(),
            "tokenizer_config.json": _json(settings | special),
            "special_tokens_map.json": _json(special),
        },
    )


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
