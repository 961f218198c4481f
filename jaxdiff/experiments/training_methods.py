"""Full fine-tuning, LoRA and textual inversion: trained parameters and export."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.checkpoints.components import Component
from jaxdiff.checkpoints.key_mapping import path_to_torch_key, to_torch
from jaxdiff.checkpoints.loading import host_memory
from jaxdiff.checkpoints.lora_names import FILES
from jaxdiff.checkpoints.lora_writing import LoRAPair, Module, write_pairs
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.checkpoints.safetensors import LazyTensor
from jaxdiff.checkpoints.textual_inversion import (
    Inversion,
    optional_encoders,
    write_inversion,
)
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, NDArray
from jaxdiff.data.texts import CaptionTokenizer
from jaxdiff.experiments.base_model import BaseModel
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.training.config import Full, LoRA, TextualInversion
from jaxdiff.training.objectives.diffusion import ParameterPartition, train_denoiser
from jaxdiff.training.objectives.trainable import (
    split_prefixes,
    train_denoiser_and_text_encoders,
    train_lora,
    train_textual_inversion,
)
from jaxdiff.training.step import HostParams

LORA = FILES[0]  # diffusers' name of LoRA files


class TrainingMethod(NamedTuple):
    """How to train and export a model."""

    partition: ParameterPartition
    caption_tokenizer: CaptionTokenizer
    export: Callable[[HostParams, pathlib.Path], None]  # writes into this folder


def make_partition(base: BaseModel, dtype: Dtype) -> ParameterPartition:
    """The parameters of `objective.trainable` as shapes, whose `init` reads initial weights."""
    config, family, networks = base.objective.trainable, base.family, base.abstract_networks(dtype)
    if isinstance(config, LoRA):
        return train_lora(family, networks, config)
    if isinstance(config, TextualInversion):
        sizes = config.num_vectors, _num_tokens(base)
        initial = functools.partial(_initial_embeddings, base, config)
        return train_textual_inversion(family, networks, *sizes, initial)
    names = [
        *(() if base.begins_at_random else (family.network,)),
        *(base.text_encoders if config.text_encoders else ()),
    ]
    train = train_denoiser_and_text_encoders if config.text_encoders else train_denoiser
    return train(family, networks, lambda: {name: base.host_weights(name) for name in names})


def make_training_method(base: BaseModel, dtype: Dtype, caption: str | None) -> TrainingMethod:
    """The method of `objective.trainable`; `caption` replaces all captions if it is given."""
    config = base.objective.trainable
    if isinstance(config, LoRA):
        return lora(base, dtype, config, caption)
    if isinstance(config, TextualInversion):
        return textual_inversion(base, dtype, config, caption)
    return full_fine_tuning(base, dtype, config, caption)


def full_fine_tuning(
    base: BaseModel, dtype: Dtype, config: Full, caption: str | None
) -> TrainingMethod:
    """All weights, exported as a pipeline folder."""
    networks, own = base.abstract_networks(dtype), base.family.network

    def export(params: HostParams, folder: pathlib.Path) -> None:
        others = [name for name in base.pipeline.components if name != own]
        stored = base.read(only=others, sharding=host_memory())  # in their dtypes
        if base.family.embeddings is not None and base.image_encoder is not None:
            stored = base.image_encoder.added_to(stored)
        components = dict(stored.components)
        trained = split_prefixes(params) if config.text_encoders else {own: params}
        for name, table in trained.items():
            before = {} if name == own else param_dict(components[name].module)
            module = with_params(networks[name], before | table)
            components[name] = Component(module=module, config=components[name].config)
        write_pipeline(folder, dataclasses.replace(stored, components=components))

    return TrainingMethod(make_partition(base, dtype), base.caption_tokenizer(caption), export)


def lora(base: BaseModel, dtype: Dtype, config: LoRA, caption: str | None) -> TrainingMethod:
    """LoRA, exported as a file for diffusers and `generate --lora`."""

    def export(params: HostParams, folder: pathlib.Path) -> None:
        pairs: dict[Module, LoRAPair] = {}
        for path in params:
            component, _, key = path_to_torch_key(path).partition(".")
            module, _, role = key.removesuffix(".weight").rpartition(".")
            if role == "lora_A":
                down, up = (
                    _lazy_tensor(params[f"{component}.{module}.{name}.kernel"], path)
                    for name in ("lora_A", "lora_B")
                )
                pairs[component, module] = LoRAPair(down, up, config.scale)
        write_pairs(folder / LORA, pairs)

    return TrainingMethod(make_partition(base, dtype), base.caption_tokenizer(caption), export)


def _lazy_tensor(array: NDArray, path: str) -> LazyTensor:
    values = to_torch(np.asarray(array, np.float32), path)
    return LazyTensor(dtype=values.dtype, shape=values.shape, fetch=lambda: values)


def textual_inversion(
    base: BaseModel, dtype: Dtype, config: TextualInversion, caption: str | None
) -> TrainingMethod:
    """Textual inversion, exported as a file for diffusers and `generate --embedding`."""
    token = config.placeholder_token
    tokens = [token, *(f"{token}_{i}" for i in range(1, config.num_vectors))]
    partition, first_id = make_partition(base, dtype), _num_tokens(base)
    caption_tokenizer = base.caption_tokenizer(caption)
    for name, column in base.family.id_columns.items():
        tokenizer = caption_tokenizer.tokenizers[column]
        _initial_token(tokenizer, config)
        tokenizer.add_tokens(tokens)
        if tokenizer.convert_tokens_to_ids(tokens) != list(range(first_id[name], len(tokenizer))):
            raise InputError(
                f"objective.trainable.placeholder_token: got {token!r}, which the tokenizer reads "
                "otherwise"
            )
    caption_tokenizer = dataclasses.replace(
        caption_tokenizer, placeholder_tokens={token: " ".join(tokens)}
    )

    def export(params: HostParams, folder: pathlib.Path) -> None:
        trained = {name: params[f"{name}.vectors"] for name in base.text_encoders}
        t5 = optional_encoders(base.text_encoders)
        write_inversion(folder, Inversion(token, trained), t5=t5)

    return TrainingMethod(partition, caption_tokenizer, export)


def _num_tokens(base: BaseModel) -> dict[str, int]:
    """How many tokens each text encoder knows: by its tokenizer, or its config without one."""
    if not base.pipeline.tokenizers:
        return {name: each.config.vocab_size for name, each in base.text_encoders.items()}
    tokenizers = base.caption_tokenizer().tokenizers
    return {name: len(tokenizers[column]) for name, column in base.family.id_columns.items()}


def _initial_embeddings(base: BaseModel, config: TextualInversion) -> dict[str, NDArray]:
    """The embeddings of the initializer token, by text encoder, for each of the vectors."""
    tokenizers, embeddings = base.caption_tokenizer().tokenizers, {}
    for name, column in base.family.id_columns.items():
        row = _initial_token(tokenizers[column], config)
        table = base.host_weights(name)[base.text_encoders[name].token_embedding]
        embeddings[name] = np.tile(table[row], (config.num_vectors, 1))
    return embeddings


def _initial_token(tokenizer: Any, config: TextualInversion) -> int:
    """The id of the initializer token; InputError unless it is one token and the other is new."""
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
