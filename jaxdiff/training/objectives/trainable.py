"""Partitions of a diffusion model that train more, or less, than its denoiser.

Paths of their parameters start with the network's name: `unet.`, `text_encoder.`.
"""

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray
from jaxdiff.families.base import Family
from jaxdiff.models.build import initial_weights, param_dict
from jaxdiff.models.clip import extend_token_embedding
from jaxdiff.models.lora import attention_projections, inject_lora, is_lora_param, layers_of
from jaxdiff.models.text_encoder import TextModel
from jaxdiff.training.config import LoRA
from jaxdiff.training.objectives.diffusion import (
    InitialWeights,
    LoadWeights,
    Networks,
    ParameterPartition,
    Table,
    Tables,
    initial_or_pretrained,
)


def train_denoiser_and_text_encoders(
    family: Family, networks: Networks, pretrained: LoadWeights
) -> ParameterPartition:
    """Train the denoiser and the text encoders, from `pretrained` weights where there are any.

    Except for weights without effect on the conditioning: only weight decay would change them.
    """
    names = [name for name in networks if name in (family.network, *family.id_columns)]
    unused = _unused_parameters(family, networks)

    def is_used(name: str, path: str) -> bool:
        return not path.startswith(unused.get(name, ()))

    def init(seed: int) -> InitialWeights:
        tables = pretrained()
        for name in names:
            for path, array in initial_or_pretrained(networks[name], tables.get(name), seed):
                if is_used(name, path):
                    yield f"{name}.{path}", array

    def merge(params: Table, frozen: Tables) -> Tables:
        trained = split_prefixes(params)
        merged = {name: {**frozen.get(name, {}), **table} for name, table in trained.items()}
        return {**frozen, **merged}

    all_params = {name: param_dict(networks[name]) for name in names}
    shapes = {
        name: {path: leaf for path, leaf in table.items() if is_used(name, path)}
        for name, table in all_params.items()
    }
    partly_frozen = {name for name in names if shapes[name].keys() != all_params[name].keys()}
    frozen = tuple(name for name in networks if name not in names or name in partly_frozen)
    return ParameterPartition(family, networks, frozen, add_prefixes(shapes), init, merge)


def _unused_parameters(family: Family, networks: Networks) -> dict[str, tuple[str, ...]]:
    """Prefixes of the paths of text encoder weights that nothing depends on."""
    return {
        spec.component: cast(TextModel, networks[spec.component]).unused_parameters(
            spec.layer or "last", spec.pooled
        )
        for spec in family.text_encoders
    }


def train_lora(family: Family, networks: Networks, config: LoRA) -> ParameterPartition:
    """Train the factors of low-rank updates."""
    own = config.target_modules
    if own is None:
        own = attention_projections(networks[family.network])
    targets = _text_targets(family, networks, config) | {family.network: own}
    with_lora, unused = dict(networks), _unused_parameters(family, networks)
    for name in networks.keys() & targets:
        size = {"rank": config.rank, "scale": config.scale}
        exclude = unused.get(name, ())
        with_lora[name] = inject_lora(networks[name], targets[name], exclude=exclude, **size)
    adapted = {name: net for name, net in with_lora.items() if targets.get(name)}

    def init(seed: int) -> InitialWeights:
        for name, network in adapted.items():
            factors = initial_weights(network, seed, only=is_lora_param)
            yield from _add_prefix(name, factors)

    def merge(params: Table, frozen: Tables) -> Tables:
        factors = split_prefixes(params)
        return {name: {**table, **factors.get(name, {})} for name, table in frozen.items()}

    shapes = add_prefixes(
        {
            name: {path: leaf for path, leaf in param_dict(network).items() if is_lora_param(path)}
            for name, network in adapted.items()
        }
    )
    return ParameterPartition(family, with_lora, tuple(networks), shapes, init, merge)


def _text_targets(family: Family, networks: Networks, config: LoRA) -> dict[str, tuple[str, ...]]:
    """The targets that each text encoder has; InputError for one that is in none of them."""
    encoders = [name for name in family.id_columns if name in networks]
    found: dict[str, tuple[str, ...]] = dict.fromkeys(encoders, ())
    for target in config.text_target_modules:
        own = [name for name in encoders if layers_of(networks[name], target)]
        if not own:
            classes = ", ".join(type(networks[name]).__name__ for name in encoders)
            raise InputError(
                f"objective.trainable.text_target_modules: got {target!r}, expected the end of a "
                f"layer's path in {classes or 'a text encoder, of which there is none'}"
            )
        found |= {name: (*found[name], target) for name in own}
    return found


def train_textual_inversion(
    family: Family,
    networks: Networks,
    num_vectors: int,
    first_id: Mapping[str, int],
    initial: Callable[[], Mapping[str, Float[NDArray, "n _"]]],
) -> ParameterPartition:
    """Train embeddings of a new token for each text encoder, at ids from its `first_id` on.

    The parameters are called `text_encoder.vectors`; `initial` reads their initial values.
    """
    extended, shapes = dict(networks), {}
    for name in first_id:
        encoder = cast(Any, nnx.clone(networks[name]))
        width = encoder.config.hidden_size
        shape = (first_id[name] + num_vectors, width)
        shapes[f"{name}.vectors"] = jax.ShapeDtypeStruct((num_vectors, width), jnp.float32)
        table = attrgetter(encoder.token_embedding)(encoder)
        table.set_value(jax.ShapeDtypeStruct(shape, jnp.float32))
        extended[name] = encoder

    def init(seed: int) -> InitialWeights:
        del seed  # nothing is random
        for name, rows in initial().items():
            yield f"{name}.vectors", np.asarray(rows, np.float32)

    def merge(params: Table, frozen: Tables) -> Tables:
        tables = dict(frozen)
        for name in first_id:
            path = cast(TextModel, networks[name]).token_embedding
            table, new_rows = frozen[name][path], params[f"{name}.vectors"]
            longer = extend_token_embedding(table, first_id[name], new_rows)
            tables[name] = {**frozen[name], path: longer}
        return tables

    return ParameterPartition(family, extended, tuple(networks), shapes, init, merge)


def add_prefixes(tables: Mapping[str, Mapping[str, Any]]) -> Table:
    """Dicts by network as one dict, whose paths start with the network's name."""
    return {f"{name}.{path}": leaf for name, t in tables.items() for path, leaf in t.items()}


def split_prefixes(params: Mapping[str, Any]) -> Tables:
    """The inverse of `add_prefixes`."""
    tables: Tables = {}
    for path, leaf in params.items():
        name, _, parameter = path.partition(".")
        tables.setdefault(name, {})[parameter] = leaf
    return tables


def _add_prefix(name: str, values: Iterable[tuple[str, NDArray]]) -> InitialWeights:
    for path, array in values:
        yield f"{name}.{path}", array


def frozen_networks_used(
    partition: ParameterPartition, *, latents: bool, text_encodings: bool
) -> tuple[str, ...]:
    """The networks whose frozen weights a training step reads.

    `latents` and `text_encodings`: whether batches have latents, and text encodings.
    """
    family = partition.family
    unused: set[str | None] = {family.latent_codec} if latents else set()
    unused |= set(family.id_columns) if text_encodings else set()
    return tuple(name for name in partition.frozen if name not in unused)
