"""Single files of DiT (2212.09748) and SiT (2401.08740): the transformer alone, in their own names.

SiT has the tensors of DiT, trained as a flow that runs the other way: its time is 0 at noise and 1
at the data, and its velocity u is data minus noise. What it says at its time 1 - t / 1000 is -u in
`flow_prediction` at t. So its last layer is read times -1, and the config has `reverses_time`.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from jaxdiff.checkpoints import infer_config, layout_parts
from jaxdiff.checkpoints.key_tables import KeyTable, rows, same, unread
from jaxdiff.checkpoints.prediction_type import stored_prediction_type
from jaxdiff.checkpoints.safetensors import LazyTensor, TensorInfo
from jaxdiff.checkpoints.single_file_layouts import (
    Entries,
    FileComponent,
    SingleFileLayout,
    Tensors,
    source_of,
)
from jaxdiff.core.errors import InputError

T = TypeVar("T")
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
# Fields in which diffusers has other values than the original code.
CODE = {"freq_shift": 0, "norm_eps": 1e-6}
LAST_LAYER = "proj_out_2."
FLOW = "flow_prediction"
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


_SIT = replace(
    _LAYOUT,
    name="SiT",
    # at equal distances from noise to the image, as SiT's code has them
    scheduler={**layout_parts.flow_scheduler(1.0), "timestep_spacing": "trailing"},
)


def _of_sit(network: FileComponent) -> FileComponent:
    """DiT's network as one of SiT, whose velocity has the other sign."""
    return replace(
        network,
        read=lambda entries: _negated(network.read(entries), TensorInfo.times_minus_one),
        write=lambda tensors: network.write(_negated(tensors, _times_minus_one)),
    )


def _negated(tensors: Mapping[str, T], negate: Callable[[T], T]) -> dict[str, T]:
    """Tensors in the names of diffusers with the last layer times -1."""
    return {n: negate(each) if n.startswith(LAST_LAYER) else each for n, each in tensors.items()}


def _times_minus_one(tensor: LazyTensor) -> LazyTensor:
    return replace(tensor, fetch=lambda: -tensor.fetch())


def detect(entries: Entries, prediction_type: str | None = None) -> SingleFileLayout | None:
    """The layout of a file of DiT, or of SiT where `prediction_type` is flow_prediction.

    None for others. InputError for a flow in the names of diffusers, which SiT's code never writes.
    """
    prefix, original = layout_parts.prefix_with(entries, ORIGINAL), True
    if prefix is None:
        prefix, original = layout_parts.prefix_with(entries, DIFFUSERS), False
    if prefix is None:
        return None
    sit = prediction_type == FLOW
    if sit and not original:
        raise InputError(
            f"{source_of(entries)}: got a flow in the names of diffusers, expected the names of "
            "SiT, or a folder, whose config says which way its times run"
        )
    layout = _SIT if sit else _LAYOUT
    network = _NETWORK if original else replace(_NETWORK, read=dict, write=dict)
    patches = entries[f"{prefix}{(ORIGINAL if original else DIFFUSERS)[0]}"]
    stored = entries.get(f"{prefix}{POSITIONS}")
    own = dict(layout.fields["transformer"])
    if stored is not None and len(stored.shape) == 3:
        own["sample_size"] = math.isqrt(stored.shape[1]) * patches.shape[-1]
    if original:
        own |= CODE | ({"reverses_time": True} if sit else {})
    network = replace(_of_sit(network) if sit else network, prefix=prefix)
    return replace(
        layout,
        components=(network, layout_parts.vae(entries)),
        fields={**layout.fields, "transformer": own},
    )


def layout_for(
    class_name: str, configs: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> SingleFileLayout:
    """The layout in which a pipeline is written: its transformer alone, as the code reads it.

    A flow is written as SiT, whose times run the other way: InputError unless the network has been
    trained with such times. A warning names fields of which the code has other values.
    """
    del class_name
    config = configs["transformer"]
    flow = stored_prediction_type(scheduler) == FLOW
    if flow != config.reverses_time:
        kind, other = ("a flow", "true") if flow else ("no flow", "false")
        raise InputError(
            f"scheduler_config.json: got the schedule of {kind} for a transformer whose "
            f"reverses_time is not {other}, expected it: a single file is of DiT, or of SiT, whose "
            "times run the other way"
        )
    for name, value in CODE.items():
        if getattr(config, name) != value:
            warnings.warn(
                f"transformer: {name}: got {getattr(config, name)}, expected {value}, which the "
                "code that reads a single file always has",
                stacklevel=2,
            )
    side = config.sample_size // config.patch_size
    network = replace(_NETWORK, write=functools.partial(_write, side=side))
    layout, network = (_SIT, _of_sit(network)) if flow else (_LAYOUT, network)
    return replace(layout, components=(network,))
