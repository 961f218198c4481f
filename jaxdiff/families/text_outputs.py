"""What the text encoders of a family give: its shapes, and its columns in a text cache."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array
from jaxdiff.data.texts import MASK_COLUMNS, POOLED_COLUMN, STATE_COLUMNS
from jaxdiff.families.base import Family, TextEncoderOutput


def num_tokens(family: Family, modules: Mapping[str, Any]) -> int:
    """How many tokens of a text the network gets, whose text encoders are among `modules`."""
    outputs = output_shapes(family, modules)
    states = jax.eval_shape(family.join, outputs).hidden_states if outputs else None
    return 0 if states is None else states.shape[-2]


def output_shapes(family: Family, modules: Mapping[str, Any]) -> dict[str, TextEncoderOutput]:
    """The shapes of what the text encoders among `modules` give for one text, by component."""
    outputs: dict[str, TextEncoderOutput] = {}
    for spec in family.text_encoders:
        encoder = modules[spec.component]
        ids = jax.ShapeDtypeStruct((1, spec.num_tokens(encoder)), jnp.int32)
        outputs[spec.component] = nnx.eval_shape(spec.encode, encoder, ids)
    return outputs


def state_columns(family: Family) -> dict[str, str]:
    """The column of training batches with the cached hidden states of each text encoder.

    Encoders without states that the network gets have none.
    """
    pairs = zip(family.text_encoders, STATE_COLUMNS, strict=False)
    return {spec.component: column for spec, column in pairs if spec.layer is not None}


def mask_columns(family: Family) -> dict[str, str]:
    """The column with the cached mask of each text encoder that gives the network one."""
    pairs = zip(family.text_encoders, MASK_COLUMNS, strict=False)
    return {spec.component: column for spec, column in pairs if spec.mask is not None}


def cached_text_columns(family: Family) -> tuple[str, ...]:
    """The columns of training batches that stand for the captions where texts are cached."""
    pooled = [POOLED_COLUMN] if family.has_pooled else []
    return (*state_columns(family).values(), *mask_columns(family).values(), *pooled)


def cached_columns(family: Family, outputs: Mapping[str, TextEncoderOutput]) -> dict[str, Array]:
    """The columns of a text cache: the outputs of the text encoders by component."""
    states = {column: outputs[name].hidden_states for name, column in state_columns(family).items()}
    masks = {column: outputs[name].mask for name, column in mask_columns(family).items()}
    states |= {name: mask.astype(jnp.float32) for name, mask in masks.items() if mask is not None}
    pooled = [each.pooled for each in outputs.values() if each.pooled is not None]
    if pooled:
        states[POOLED_COLUMN] = jnp.concatenate(pooled, axis=-1)
    return {name: array for name, array in states.items() if array is not None}


def cached_outputs(
    family: Family, columns: Mapping[str, Array], modules: Mapping[str, Any]
) -> list[TextEncoderOutput]:
    """The outputs of the text encoders in a text cache: the inverse of `cached_columns`.

    `modules` has the text encoders, which may be shapes: they are asked how wide each of several
    pooled embeddings is.
    """
    pooled = dict.fromkeys(spec.component for spec in family.text_encoders if spec.pooled)
    if len(pooled) > 1:
        shapes, first = output_shapes(family, modules), 0
        for name in pooled:
            last = first + cast(Any, shapes[name].pooled).shape[-1]
            pooled[name], first = columns[POOLED_COLUMN][..., first:last], last
    elif pooled:
        pooled = dict.fromkeys(pooled, columns[POOLED_COLUMN])
    names = state_columns(family)
    states = {name: columns[column] for name, column in names.items()}
    masks = {name: columns[column] > 0.5 for name, column in mask_columns(family).items()}
    components = [spec.component for spec in family.text_encoders]
    return [
        TextEncoderOutput(states.get(name), pooled.get(name), masks.get(name))
        for name in components
    ]
