"""What of a model is trained, and how that is exported."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.checkpoints.components import Component
from jaxdiff.checkpoints.key_mapping import path_to_torch_key, to_torch
from jaxdiff.checkpoints.lora_names import FILES
from jaxdiff.checkpoints.lora_writing import LoRAPair, Module, write_pairs
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.checkpoints.safetensors import LazyTensor
from jaxdiff.checkpoints.textual_inversion import Inversion, write_inversion
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, NDArray
from jaxdiff.data.texts import CaptionTokenizer
from jaxdiff.experiments.base_model import Begun
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.clip import TOKEN_EMBEDDING
from jaxdiff.training.config import Full, LoRA, TextualInversion
from jaxdiff.training.objectives import Whole
from jaxdiff.training.objectives.diffusion import IDS
from jaxdiff.training.objectives.trainable import (
    Tuned,
    divided,
    low_rank,
    new_word,
    unet_only,
    with_encoders,
)

LORA = FILES[0]  # what diffusers calls a LoRA's file


class Chosen(NamedTuple):
    """A kind of tuning made concrete."""

    tuned: Tuned
    texts: CaptionTokenizer
    export: Callable[[Whole, pathlib.Path], None]  # writes into this folder


def tuning(begun: Begun, dtype: Dtype, caption: str | None) -> Chosen:
    """The tuning that the objective asks for; captions are all `caption` where that is said."""
    config = begun.objective.trainable
    if isinstance(config, LoRA):
        return lora(begun, dtype, config, caption)
    if isinstance(config, TextualInversion):
        return inversion(begun, dtype, config, caption)
    return full(begun, dtype, config, caption)


def full(begun: Begun, dtype: Dtype, config: Full, caption: str | None) -> Chosen:
    """All weights, exported as a pipeline folder."""
    networks, read = begun.networks(dtype), begun.read
    names = [
        *(() if config.from_scratch else ("unet",)),
        *(begun.encoders if config.text_encoders else ()),
    ]

    def given() -> dict[str, dict[str, Any]]:
        components = read().components
        return {name: param_dict(components[name].module) for name in names if name in components}

    def export(params: Whole, folder: pathlib.Path) -> None:
        stored = read()  # in their dtypes
        components = dict(stored.components)
        trained: dict[str, Any] = divided(params) if config.text_encoders else {"unet": params}
        for name, table in trained.items():
            before = components.get(name)
            known = {} if before is None else param_dict(before.module)
            module = with_params(networks[name], known | table)
            raw = {} if before is None else before.config
            components[name] = Component(module=module, config=raw)
        write_pipeline(folder, dataclasses.replace(stored, components=components))

    tuned = with_encoders(networks, given) if config.text_encoders else unet_only(networks, given)
    return Chosen(tuned, begun.texts(caption), export)


def lora(begun: Begun, dtype: Dtype, config: LoRA, caption: str | None) -> Chosen:
    """Low-rank changes, exported as a file that diffusers and `generate --lora` read."""
    tuned = low_rank(begun.networks(dtype), config)

    def export(params: Whole, folder: pathlib.Path) -> None:
        pairs: dict[Module, LoRAPair] = {}
        for path in params:
            component, _, key = path_to_torch_key(path).partition(".")
            module, _, role = key.removesuffix(".weight").rpartition(".")
            if role == "lora_A":
                down, up = (
                    _pending(params[f"{component}.{module}.{name}.kernel"], path)
                    for name in ("lora_A", "lora_B")
                )
                pairs[component, module] = LoRAPair(down, up, config.scale)
        write_pairs(folder / LORA, pairs)

    return Chosen(tuned, begun.texts(caption), export)


def _pending(array: NDArray, path: str) -> LazyTensor:
    values = to_torch(np.asarray(array, np.float32), path)
    return LazyTensor(dtype=values.dtype, shape=values.shape, fetch=lambda: values)


def inversion(begun: Begun, dtype: Dtype, config: TextualInversion, caption: str | None) -> Chosen:
    """Vectors of a new word, exported as a file that diffusers and `generate --embedding` read."""
    parts = [
        config.placeholder_token,
        *(f"{config.placeholder_token}_{i}" for i in range(1, config.num_vectors)),
    ]
    texts = begun.texts(caption)
    vectors, first = {}, {}
    for name in begun.encoders:
        tokenizer = texts.tokenizers[IDS[name]]
        row = _token(tokenizer, config)
        vectors[name] = np.tile(begun.table(name)[TOKEN_EMBEDDING][row], (config.num_vectors, 1))
        first[name] = len(tokenizer)
        tokenizer.add_tokens(parts)
        if tokenizer.convert_tokens_to_ids(parts) != list(range(first[name], len(tokenizer))):
            raise InputError(
                f"objective.trainable.placeholder_token: got {config.placeholder_token!r}, which "
                "the tokenizer reads otherwise"
            )
    tuned = new_word(begun.networks(dtype), vectors, first)
    texts = dataclasses.replace(
        texts, placeholder_tokens={config.placeholder_token: " ".join(parts)}
    )

    def export(params: Whole, folder: pathlib.Path) -> None:
        learnt = {name: params[f"{name}.vectors"] for name in vectors}
        write_inversion(folder, Inversion(config.placeholder_token, learnt))

    return Chosen(tuned, texts, export)


def _token(tokenizer: Any, config: TextualInversion) -> int:
    """The id of the word to begin with; InputError unless it is one, and the new word none."""
    if config.placeholder_token in tokenizer.get_vocab():
        raise InputError(
            f"objective.trainable.placeholder_token: got {config.placeholder_token!r}, which is a "
            "token already, expected a new one"
        )
    ids = tokenizer(config.initializer_token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(
            f"objective.trainable.initializer_token: got {config.initializer_token!r}, which is "
            f"{len(ids)} tokens, expected a word of one"
        )
    return ids[0]
