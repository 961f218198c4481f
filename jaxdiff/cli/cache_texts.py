"""What the text encoders of a model say of captions, for `jaxdiff cache-latents`."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdiff.checkpoints.components import CONFIG, read_component
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.tokenizers import read_tokenizer, tokenizer_digest
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, NDArray
from jaxdiff.data.latents import pack_arrays
from jaxdiff.data.texts import CaptionTokenizer
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.conditioning import EMBEDDING_COLUMNS, ENCODERS, POOLED, encode_text
from jaxdiff.parallel.mesh import replicate, shard_batch
from jaxdiff.pipeline.parts import ENCODERS as TOKENIZERS
from jaxdiff.pipeline.vocabulary import tokenizer_of

Said = dict[str, NDArray]
Say = Callable[[Sequence[str]], Said]


class Readers(NamedTuple):
    """Text encoders, and what tells them captions."""

    encoders: Mapping[str, CLIPTextModel]
    texts: CaptionTokenizer  # whose ids have the encoders' names
    pooled: bool  # whether the end of the text is told, and the states before the last layer
    digests: tuple[str, ...]  # of the encoders' weights
    tokenizers: tuple[str, ...]  # and of their tokenizers

    def described(self) -> dict[str, Any]:
        """The fields of latents.json that say who has read the captions."""
        encoders = list(self.encoders.values())
        return {
            "text_encoders": self.digests,
            "tokenizers": self.tokenizers,
            "tokens": tuple(len(ids[0]) for ids in self.texts([""]).values()),
            "state_widths": tuple(each.config.hidden_size for each in encoders),
            "pooled_width": encoders[-1].config.projection_dim if self.pooled else 0,
        }


def read_readers(folder: pathlib.Path, dtype: Dtype) -> Readers:
    """The text encoders in the folder of a model, or beside a tokenizer."""
    names = [name for name in ENCODERS if (folder / name).is_dir()]
    if not names:
        raise InputError(
            f"text_encoder: got {folder} without {ENCODERS[0]}, expected a folder with "
            f"{ENCODERS[0]}/ and {TOKENIZERS[ENCODERS[0]]}/"
        )
    files = {name: read_tokenizer(folder / TOKENIZERS[name]) for name in names}
    encoders: dict[str, CLIPTextModel] = {}
    for name in names:
        module = read_component(folder / name, dtype=dtype).module
        if not isinstance(module, CLIPTextModel):
            raise InputError(
                f"text_encoder: got {type(module).__name__} in {folder / name}, "
                "expected CLIPTextModel"
            )
        encoders[name] = module
    pooled = _pooled(folder, names)
    if pooled and encoders[names[-1]].text_projection is None:
        raise InputError(f"{folder / names[-1]}: got no projection, expected one")
    return Readers(
        encoders=encoders,
        texts=CaptionTokenizer(tokenizers={name: tokenizer_of(files[name]) for name in names}),
        pooled=pooled,
        digests=tuple(digest(find_weights(folder / name)) for name in names),
        tokenizers=tuple(tokenizer_digest(files[name]) for name in names),
    )


def _pooled(folder: pathlib.Path, names: Sequence[str]) -> bool:
    """Whether the UNet is told pooled text: as it says, else where there are two encoders."""
    config = folder / "unet" / CONFIG
    if config.is_file():
        return read_object(config).get("addition_embed_type") is not None
    return len(names) > 1


def sayer(readers: Readers, batch_size: int, mesh: Any) -> Say:
    """What the encoders say of up to `batch_size` captions, by the names that data have for it."""
    tables = {n: replicate(param_dict(each), mesh) for n, each in readers.encoders.items()}
    last = list(tables)[-1]

    @jax.jit
    def program(tables: Any, ids: Mapping[str, Array]) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for name, encoder in readers.encoders.items():
            each = encode_text(with_params(encoder, tables[name]), ids[name], pooled=readers.pooled)
            found[EMBEDDING_COLUMNS[name]] = each.hidden_states
            if each.pooled is not None and name == last:
                found[POOLED] = each.pooled
        return found

    def say(captions: Sequence[str]) -> Said:
        padded = [*captions, *[""] * (batch_size - len(captions))]
        ids = shard_batch(readers.texts(padded), mesh)
        found = jax.device_get(program(tables, ids))
        return {name: np.asarray(array[: len(captions)]) for name, array in found.items()}

    return say


def null_record(say: Say, dtype: str) -> dict[str, bytes]:
    """What is said of the null caption."""
    return pack_arrays({name: array[0] for name, array in say([""]).items()}, dtype)
