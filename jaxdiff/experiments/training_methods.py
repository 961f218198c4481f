"""Full fine-tuning, LoRA and textual inversion: trained parameters and export."""

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
from jaxdiff.experiments.base_model import BaseModel
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.clip import TOKEN_EMBEDDING
from jaxdiff.training.config import Full, LoRA, TextualInversion
from jaxdiff.training.objectives import HostParams
from jaxdiff.training.objectives.trainable import (
    ParameterPartition,
    split_prefixes,
    train_denoiser,
    train_denoiser_and_text_encoders,
    train_lora,
    train_textual_inversion,
)

LORA = FILES[0]  # diffusers' name of LoRA files


class TrainingMethod(NamedTuple):
    """How to train and export a model."""

    partition: ParameterPartition
    caption_tokenizer: CaptionTokenizer
    export: Callable[[HostParams, pathlib.Path], None]  # writes into this folder


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
    networks, reload = base.abstract_networks(dtype), base.reload
    names = [
        *(() if config.from_scratch else (base.family.network,)),
        *(base.text_encoders if config.text_encoders else ()),
    ]

    def load_pretrained() -> dict[str, dict[str, Any]]:
        components = reload().components
        return {name: param_dict(components[name].module) for name in names if name in components}

    def export(params: HostParams, folder: pathlib.Path) -> None:
        stored = reload()  # in their dtypes
        components = dict(stored.components)
        trained: dict[str, Any] = (
            split_prefixes(params) if config.text_encoders else {base.family.network: params}
        )
        for name, table in trained.items():
            component = components.get(name)
            base_weights = {} if component is None else param_dict(component.module)
            module = with_params(networks[name], base_weights | table)
            raw = {} if component is None else component.config
            components[name] = Component(module=module, config=raw)
        write_pipeline(folder, dataclasses.replace(stored, components=components))

    partition = (
        train_denoiser_and_text_encoders(base.family, networks, load_pretrained)
        if config.text_encoders
        else train_denoiser(base.family, networks, load_pretrained)
    )
    return TrainingMethod(partition, base.caption_tokenizer(caption), export)


def lora(base: BaseModel, dtype: Dtype, config: LoRA, caption: str | None) -> TrainingMethod:
    """LoRA, exported as a file for diffusers and `generate --lora`."""
    partition = train_lora(base.family, base.abstract_networks(dtype), config)

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

    return TrainingMethod(partition, base.caption_tokenizer(caption), export)


def _lazy_tensor(array: NDArray, path: str) -> LazyTensor:
    values = to_torch(np.asarray(array, np.float32), path)
    return LazyTensor(dtype=values.dtype, shape=values.shape, fetch=lambda: values)


def textual_inversion(
    base: BaseModel, dtype: Dtype, config: TextualInversion, caption: str | None
) -> TrainingMethod:
    """Textual inversion, exported as a file for diffusers and `generate --embedding`."""
    tokens = [
        config.placeholder_token,
        *(f"{config.placeholder_token}_{i}" for i in range(1, config.num_vectors)),
    ]
    caption_tokenizer = base.caption_tokenizer(caption)
    embeddings, first_id = {}, {}
    for name in base.text_encoders:
        tokenizer = caption_tokenizer.tokenizers[base.family.id_columns[name]]
        row = _initial_token(tokenizer, config)
        embeddings[name] = np.tile(
            base.host_weights(name)[TOKEN_EMBEDDING][row], (config.num_vectors, 1)
        )
        first_id[name] = len(tokenizer)
        tokenizer.add_tokens(tokens)
        if tokenizer.convert_tokens_to_ids(tokens) != list(range(first_id[name], len(tokenizer))):
            raise InputError(
                f"objective.trainable.placeholder_token: got {config.placeholder_token!r}, which "
                "the tokenizer reads otherwise"
            )
    networks = base.abstract_networks(dtype)
    partition = train_textual_inversion(base.family, networks, embeddings, first_id)
    caption_tokenizer = dataclasses.replace(
        caption_tokenizer, placeholder_tokens={config.placeholder_token: " ".join(tokens)}
    )

    def export(params: HostParams, folder: pathlib.Path) -> None:
        trained = {name: params[f"{name}.vectors"] for name in embeddings}
        write_inversion(folder, Inversion(config.placeholder_token, trained))

    return TrainingMethod(partition, caption_tokenizer, export)


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
