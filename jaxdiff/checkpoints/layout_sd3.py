"""Single files of Stable Diffusion 3 and 3.5: with and without text encoders, and their names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxdiff.checkpoints import infer_config, layout_parts
from jaxdiff.checkpoints.key_tables import KeyTable, Rule, rows, same, swapped
from jaxdiff.checkpoints.single_file_layouts import (
    UNET,
    Entries,
    FileComponent,
    SingleFileLayout,
    source_of,
)
from jaxdiff.core.errors import InputError

PIPELINES = tuple(f"StableDiffusion3{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))
ORIGINAL = ("joint_blocks.0.x_block.attn.qkv.weight", "pos_embed", "context_embedder.weight")
DIFFUSERS = ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight")
_X, _C, _T = "joint_blocks.*.x_block", "joint_blocks.*.context_block", "transformer_blocks.*"


def _attention(original: str, name: str, added: str = "") -> tuple[Rule, ...]:
    """Queries, keys and values in one, their norms, and the output."""
    q, k, v = (f"{name}.add_{x}_proj." if added else f"{name}.to_{x}." for x in "qkv")
    return (
        rows(f"{original}.qkv.", q, k, v),
        same(f"{original}.ln_q.", f"{name}.norm_{added}q."),
        same(f"{original}.ln_k.", f"{name}.norm_{added}k."),
        same(f"{original}.proj.", f"{name}.{'to_add_out' if added else 'to_out.0'}."),
    )


TABLE = KeyTable(
    (
        same("pos_embed", "pos_embed.pos_embed"),
        same("x_embedder.proj.", "pos_embed.proj."),
        same("context_embedder.", "context_embedder."),
        same("t_embedder.mlp.0.", "time_text_embed.timestep_embedder.linear_1."),
        same("t_embedder.mlp.2.", "time_text_embed.timestep_embedder.linear_2."),
        same("y_embedder.mlp.0.", "time_text_embed.text_embedder.linear_1."),
        same("y_embedder.mlp.2.", "time_text_embed.text_embedder.linear_2."),
        same(f"{_X}.adaLN_modulation.1.", f"{_T}.norm1.linear."),
        # The text takes no part in what follows the last block: shift and scale alone.
        swapped(
            "joint_blocks.$.context_block.adaLN_modulation.1.",
            "transformer_blocks.$.norm1_context.linear.",
        ),
        same(f"{_C}.adaLN_modulation.1.", f"{_T}.norm1_context.linear."),
        *_attention(f"{_X}.attn", f"{_T}.attn"),
        *_attention(f"{_C}.attn", f"{_T}.attn", "added_"),
        *_attention(f"{_X}.attn2", f"{_T}.attn2"),
        same(f"{_X}.mlp.fc1.", f"{_T}.ff.net.0.proj."),
        same(f"{_X}.mlp.fc2.", f"{_T}.ff.net.2."),
        same(f"{_C}.mlp.fc1.", f"{_T}.ff_context.net.0.proj."),
        same(f"{_C}.mlp.fc2.", f"{_T}.ff_context.net.2."),
        swapped("final_layer.adaLN_modulation.1.", "norm_out.linear."),
        same("final_layer.linear.", "proj_out."),
    ),
    original_blocks="joint_blocks.",
    blocks="transformer_blocks.",
)
_NETWORK = FileComponent(
    name="transformer",
    class_name="SD3Transformer2DModel",
    prefix=UNET,
    config=infer_config.sd3_fields,
    read=TABLE.from_original,
    write=TABLE.to_original,
)
LAYOUT = SingleFileLayout(
    name="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    components=(
        _NETWORK,
        layout_parts.vae({}),
        layout_parts.clip_l(projects=True),
        layout_parts.clip_g(),
        layout_parts.t5("_3", optional=True),
    ),
    scheduler=layout_parts.flow_scheduler(3.0),
    fields={
        "transformer": {"sample_size": 128},
        "vae": {"sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        "text_encoder": {"hidden_act": "quick_gelu"},
        "text_encoder_2": {"hidden_act": "gelu"},
    },
    stores_schedule=False,
)


def detect(entries: Entries, prediction_type: str | None = None) -> SingleFileLayout | None:
    """The layout of a file of Stable Diffusion 3; None for others, InputError for a variant."""
    del prediction_type  # of others, whose files are of two kinds
    prefix, network = layout_parts.prefix_with(entries, ORIGINAL), _NETWORK
    if prefix is None:
        prefix = layout_parts.prefix_with(entries, DIFFUSERS)
        network = replace(_NETWORK, read=dict, write=dict)
    if prefix is None:
        return None
    if any(name.startswith(f"{prefix}context_processor.") for name in entries):
        raise InputError(
            f"{source_of(entries)}: got Stable Diffusion 3.5 with a context_processor, which is "
            "not supported, expected one without"
        )
    _, _, *texts = LAYOUT.components
    own = (replace(network, prefix=prefix), layout_parts.vae(entries), *texts)
    half = any(f".{block}." in name for block in ("attn.ln_q", "attn.norm_q") for name in entries)
    name = "Stable Diffusion 3.5" if half else "Stable Diffusion 3"
    return replace(LAYOUT, name=name, components=own)


def layout_for(
    class_name: str, configs: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> SingleFileLayout:
    """The layout in which a pipeline is written."""
    del class_name, configs, scheduler  # there is one
    return LAYOUT
