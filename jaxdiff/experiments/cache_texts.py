"""The text embeddings that `jaxdiff cache-latents` stores."""

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

TextEmbeddings = dict[str, NDArray]
EncodeText = Callable[[Sequence[str]], TextEmbeddings]


class TextEncoders(NamedTuple):
    """The text encoders of a model and the tokenizers of captions."""

    encoders: Mapping[str, CLIPTextModel]
    tokenize: CaptionTokenizer  # gives token ids by the names of the encoders
    pooled: bool  # whether to add pooled embeddings, and take the states before the last layer
    digests: tuple[str, ...]  # of the weights
    tokenizers: tuple[str, ...]  # digests of the tokenizers

    def cache_info(self) -> dict[str, Any]:
        """The fields of latents.json that identify the text encoders."""
        encoders = list(self.encoders.values())
        return {
            "text_encoders": self.digests,
            "tokenizers": self.tokenizers,
            "tokens": tuple(len(ids[0]) for ids in self.tokenize([""]).values()),
            "state_widths": tuple(each.config.hidden_size for each in encoders),
            "pooled_width": encoders[-1].config.projection_dim if self.pooled else 0,
        }


def load_text_encoders(folder: pathlib.Path, dtype: Dtype) -> TextEncoders:
    """Load the text encoders and tokenizers of a pipeline folder."""
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
        raise InputError(
            f"{folder / names[-1]}: got a text encoder without text_projection, expected one "
            "with it"
        )
    return TextEncoders(
        encoders=encoders,
        tokenize=CaptionTokenizer(tokenizers={name: tokenizer_of(files[name]) for name in names}),
        pooled=pooled,
        digests=tuple(digest(find_weights(folder / name)) for name in names),
        tokenizers=tuple(tokenizer_digest(files[name]) for name in names),
    )


def _pooled(folder: pathlib.Path, names: Sequence[str]) -> bool:
    """Whether the UNet takes pooled embeddings: as its config says, else with two encoders."""
    config = folder / "unet" / CONFIG
    if config.is_file():
        return read_object(config).get("addition_embed_type") is not None
    return len(names) > 1


def make_text_encoder(text_encoders: TextEncoders, batch_size: int, mesh: Any) -> EncodeText:
    """A function that encodes up to `batch_size` captions into the columns of the cache."""
    params = {n: replicate(param_dict(each), mesh) for n, each in text_encoders.encoders.items()}
    last = list(params)[-1]

    @jax.jit
    def program(params: Any, ids: Mapping[str, Array]) -> dict[str, Array]:
        embeddings: dict[str, Array] = {}
        for name, encoder in text_encoders.encoders.items():
            output = encode_text(
                with_params(encoder, params[name]), ids[name], pooled=text_encoders.pooled
            )
            embeddings[EMBEDDING_COLUMNS[name]] = output.hidden_states
            if output.pooled is not None and name == last:
                embeddings[POOLED] = output.pooled
        return embeddings

    def encode(captions: Sequence[str]) -> TextEmbeddings:
        padded = [*captions, *[""] * (batch_size - len(captions))]
        ids = shard_batch(text_encoders.tokenize(padded), mesh)
        embeddings = jax.device_get(program(params, ids))
        return {name: np.asarray(array[: len(captions)]) for name, array in embeddings.items()}

    return encode


def null_record(encode: EncodeText, dtype: str) -> dict[str, bytes]:
    """The text embeddings of the null caption."""
    return pack_arrays({name: array[0] for name, array in encode([""]).items()}, dtype)
