"""Single files of DiT (2212.09748): the transformer alone, in the names of its own code."""

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxdiff.checkpoints import infer_config, layout_parts
from jaxdiff.checkpoints.key_tables import KeyTable, rows, same, unread
from jaxdiff.checkpoints.safetensors import LazyTensor
from jaxdiff.checkpoints.single_file_layouts import (
    Entries,
    FileComponent,
    SingleFileLayout,
    Tensors,
    source_of,
)
from jaxdiff.core.errors import InputError

PIPELINES = ("DiTPipeline",)
ORIGINAL = (
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "blocks.0.attn.qkv.weight",
)
DIFFUSERS = (
    "pos_embed.proj.weight",
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
)
POSITIONS = "pos_embed"  # fixed sines and cosines, which the code stores all the same
_B, _T = "blocks.*", "transformer_blocks.*"
TABLE = KeyTable(
    (
        unread(POSITIONS),
        same("x_embedder.proj.", "pos_embed.proj."),
        # In diffusers every block has a copy of the embedders.
        same("t_embedder.mlp.0.", f"{_T}.norm1.emb.timestep_embedder.linear_1."),
        same("t_embedder.mlp.2.", f"{_T}.norm1.emb.timestep_embedder.linear_2."),
        same("y_embedder.embedding_table.", f"{_T}.norm1.emb.class_embedder.embedding_table."),
        same(f"{_B}.adaLN_modulation.1.", f"{_T}.norm1.linear."),
        rows(f"{_B}.attn.qkv.", *(f"{_T}.attn1.to_{x}." for x in "qkv")),
        same(f"{_B}.attn.proj.", f"{_T}.attn1.to_out.0."),
        same(f"{_B}.mlp.fc1.", f"{_T}.ff.net.0.proj."),
        same(f"{_B}.mlp.fc2.", f"{_T}.ff.net.2."),
        same("final_layer.adaLN_modulation.1.", "proj_out_1."),
        same("final_layer.linear.", "proj_out_2."),
    ),
    original_blocks="blocks.",
    blocks="transformer_blocks.",
)


def positions(width: int, side: int) -> np.ndarray:
    """The embeddings (1, side x side, width) of the places of a square, by rows.

    The first half of the channels has the column, the second the row: sines, then cosines of the
    place times 10000^(-4 i / width) for i from 0.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(side * side), side)
    halves = [np.outer(place, frequencies) for place in (column, row)]
    found = np.concatenate([wave(half) for half in halves for wave in (np.sin, np.cos)], axis=1)
    return found[None].astype(np.float32)


def _write(tensors: Tensors, *, side: int | None = None) -> dict[str, LazyTensor]:
    """The tensors of the original code; `side` of the positions in patches, None: without them."""
    found = TABLE.to_original(tensors)
    if side is not None:
        weight = found["x_embedder.proj.weight"]
        width = weight.shape[0]
        found[POSITIONS] = LazyTensor(
            dtype=weight.dtype,
            shape=(1, side * side, width),
            fetch=lambda: positions(width, side).astype(weight.dtype),
        )
    return found


_NETWORK = FileComponent(
    name="transformer",
    class_name="DiTTransformer2DModel",
    prefix="",
    config=infer_config.dit_fields,
    read=TABLE.from_original,
    write=_write,
)
_LAYOUT = SingleFileLayout(
    name="DiT",
    pipeline="DiTPipeline",
    components=(_NETWORK, layout_parts.vae({})),
    scheduler={
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "trained_betas": None,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "prediction_type": "epsilon",
    },
    fields={
        "transformer": {"sample_size": 32},
        "vae": {"sample_size": 256, "scaling_factor": 0.18215},
    },
)


def detect(entries: Entries, prediction_type: str | None = None) -> SingleFileLayout | None:
    """The layout of a file of DiT; None for others.

    SiT's files have the same names, and a network that predicts the velocity from 0, noise, to 1:
    InputError where `prediction_type` says that it is one.
    """
    prefix, network = layout_parts.prefix_with(entries, ORIGINAL), _NETWORK
    if prefix is None:
        prefix = layout_parts.prefix_with(entries, DIFFUSERS)
        network = replace(_NETWORK, read=dict, write=dict)
    if prefix is None:
        return None
    if prediction_type == "flow_prediction":
        raise InputError(
            f"{source_of(entries)}: got a file of SiT, whose times run the other way, which is not "
            "supported, expected one of DiT"
        )
    stored = entries.get(f"{prefix}{POSITIONS}")
    fields = dict(_LAYOUT.fields)
    patches = [
        entries[f"{prefix}{n}"] for n in (ORIGINAL[0], DIFFUSERS[0]) if f"{prefix}{n}" in entries
    ]
    if stored is not None and len(stored.shape) == 3:
        side = math.isqrt(stored.shape[1]) * patches[0].shape[-1]
        fields["transformer"] = {"sample_size": side}
    own = (replace(network, prefix=prefix), layout_parts.vae(entries))
    return replace(_LAYOUT, components=own, fields=fields)


def layout_for(
    class_name: str, configs: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> SingleFileLayout:
    """The layout in which a pipeline is written: its transformer alone, as the code reads it."""
    del class_name, scheduler
    config = configs["transformer"]
    write = functools.partial(_write, side=config.sample_size // config.patch_size)
    return replace(_LAYOUT, components=(replace(_NETWORK, write=write),))
