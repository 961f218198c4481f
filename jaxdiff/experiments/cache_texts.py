"""The text embeddings that `jaxdiff cache-latents` stores."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.tokenizers import read_tokenizer, tokenizer_digest
from jaxdiff.checkpoints.weights import digest, find_weights
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, NDArray
from jaxdiff.data.latent_records import pack_arrays
from jaxdiff.data.texts import CaptionTokenizer
from jaxdiff.families.base import Family
from jaxdiff.families.detection import family_of_folder
from jaxdiff.families.text_outputs import cached_columns, output_shapes
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.text_encoder import TextModel
from jaxdiff.parallel.mesh import replicate, shard_batch
from jaxdiff.pipeline.tokenizers import tokenizer_of

TextEmbeddings = dict[str, NDArray]
EncodeText = Callable[[Sequence[str]], TextEmbeddings]


class TextEncoders(NamedTuple):
    """The text encoders of a model and the tokenizers of captions."""

    family: Family
    encoders: Mapping[str, TextModel]
    tokenize: CaptionTokenizer  # gives token ids by the names of the encoders
    digests: tuple[str, ...]  # of the weights
    tokenizers: tuple[str, ...]  # digests of the tokenizers

    def cache_info(self) -> dict[str, Any]:
        """The fields of latents.json that identify the text encoders."""
        outputs = output_shapes(self.family, self.encoders).values()
        states = [output.hidden_states for output in outputs]
        pooled = [output.pooled for output in outputs if output.pooled is not None]
        masked = tuple(output.mask is not None for output in outputs)
        return {
            "text_encoders": self.digests,
            "tokenizers": self.tokenizers,
            "tokens": tuple(len(ids[0]) for ids in self.tokenize([""]).values()),
            "state_widths": tuple(0 if each is None else each.shape[-1] for each in states),
            "masked": masked if any(masked) else (),
            "pooled_width": sum(each.shape[-1] for each in pooled),
        }


def load_text_encoders(folder: pathlib.Path, dtype: Dtype) -> TextEncoders:
    """Load the text encoders and tokenizers of a pipeline folder."""
    family = family_of_folder(folder)
    files, encoders = {}, {}
    for spec in family.text_encoders:
        name = spec.component
        files[name] = read_tokenizer(folder / spec.tokenizer)
        module: Any = read_component(folder / name, dtype=dtype).module
        if not hasattr(module, "features"):
            raise InputError(
                f"text_encoder: got {type(module).__name__} in {folder / name}, "
                "expected a text encoder"
            )
        encoders[name] = module
    return TextEncoders(
        family=family,
        encoders=encoders,
        tokenize=CaptionTokenizer(
            tokenizers={
                spec.component: tokenizer_of(
                    files[spec.component], spec.length, lowercases=spec.lowercases
                )
                for spec in family.text_encoders
            }
        ),
        digests=tuple(digest(find_weights(folder / name)) for name in files),
        tokenizers=tuple(map(tokenizer_digest, files.values())),
    )


def make_text_encoder(text_encoders: TextEncoders, batch_size: int, mesh: Any) -> EncodeText:
    """A function that encodes up to `batch_size` captions into the columns of the cache."""
    family, encoders = text_encoders.family, cast(Mapping[str, Any], text_encoders.encoders)
    params = {name: replicate(param_dict(each), mesh) for name, each in encoders.items()}

    @jax.jit
    def program(params: Any, ids: Mapping[str, Array]) -> dict[str, Array]:
        outputs = {
            spec.component: spec.encode(
                with_params(encoders[spec.component], params[spec.component]), ids[spec.component]
            )
            for spec in family.text_encoders
        }
        return cached_columns(family, outputs)

    def encode(captions: Sequence[str]) -> TextEmbeddings:
        padded = [*captions, *[""] * (batch_size - len(captions))]
        ids = shard_batch(text_encoders.tokenize(padded), mesh)
        embeddings = jax.device_get(program(params, ids))
        return {name: np.asarray(array[: len(captions)]) for name, array in embeddings.items()}

    return encode


def null_record(encode: EncodeText, dtype: str) -> dict[str, bytes]:
    """The text embeddings of the null caption."""
    return pack_arrays({name: array[0] for name, array in encode([""]).items()}, dtype)
