"""Single files of FLUX.1 and Chroma, in the names of Black Forest Labs or of diffusers."""

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
)
from jaxdiff.core.errors import InputError

ALTERNATIVES = tuple(
    f"Flux{task}Pipeline" for task in ("Img2Img", "Inpaint", "Kontext", "KontextInpaint")
)
CONTROL_PIPELINES = tuple(f"FluxControl{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))
FLUX_PIPELINES = ("FluxPipeline", *ALTERNATIVES, "FluxFillPipeline", *CONTROL_PIPELINES)
CHROMA_PIPELINES = tuple(f"Chroma{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))
PIPELINES = (*FLUX_PIPELINES, *CHROMA_PIPELINES)
ORIGINAL = ("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "txt_in.weight")
DIFFUSERS = ("single_transformer_blocks.0.attn.to_q.weight", "x_embedder.weight")
APPROXIMATOR = "distilled_guidance_layer.in_proj.weight"  # of Chroma
UNSUPPORTED = {196: "Flex.2"}  # by columns of what the network takes
MLP_RATIO = 4

_D, _T = "double_blocks.*", "transformer_blocks.*"
_S, _U = "single_blocks.*", "single_transformer_blocks.*"


def _stream(original: str, attention: tuple[str, str, str], added: str, feed_forward: str):
    """The rules of one of the two streams of a double block, but for its modulation."""
    output = "to_add_out" if added else "to_out.0"
    own = f"{_D}.{original}_attn"
    return (
        rows(f"{own}.qkv.", *(f"{_T}.attn.{name}." for name in attention)),
        same(f"{own}.norm.query_norm.scale", f"{_T}.attn.norm_{added}q.weight"),
        same(f"{own}.norm.key_norm.scale", f"{_T}.attn.norm_{added}k.weight"),
        same(f"{own}.proj.", f"{_T}.attn.{output}."),
        same(f"{_D}.{original}_mlp.0.", f"{_T}.{feed_forward}.net.0.proj."),
        same(f"{_D}.{original}_mlp.2.", f"{_T}.{feed_forward}.net.2."),
    )


_COMMON: tuple[Rule, ...] = (
    same("img_in.", "x_embedder."),
    same("txt_in.", "context_embedder."),
    *_stream("img", ("to_q", "to_k", "to_v"), "", "ff"),
    *_stream("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "added_", "ff_context"),
    rows(
        f"{_S}.linear1.",
        *(f"{_U}.{name}." for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        heights=(1, 1, 1, MLP_RATIO),
    ),
    same(f"{_S}.norm.query_norm.scale", f"{_U}.attn.norm_q.weight"),
    same(f"{_S}.norm.key_norm.scale", f"{_U}.attn.norm_k.weight"),
    same(f"{_S}.linear2.", f"{_U}.proj_out."),
    same("final_layer.linear.", "proj_out."),
)


def _embedder(original: str, name: str) -> tuple[Rule, Rule]:
    return (
        same(f"{original}.in_layer.", f"time_text_embed.{name}.linear_1."),
        same(f"{original}.out_layer.", f"time_text_embed.{name}.linear_2."),
    )


FLUX_TABLE = KeyTable(
    (
        *_embedder("time_in", "timestep_embedder"),
        *_embedder("guidance_in", "guidance_embedder"),
        *_embedder("vector_in", "text_embedder"),
        *_COMMON,
        same(f"{_D}.img_mod.lin.", f"{_T}.norm1.linear."),
        same(f"{_D}.txt_mod.lin.", f"{_T}.norm1_context.linear."),
        same(f"{_S}.modulation.lin.", f"{_U}.norm.linear."),
        swapped("final_layer.adaLN_modulation.1.", "norm_out.linear."),
    ),
    original_blocks="double_blocks.",
    blocks="transformer_blocks.",
)
# Modulations come from one network, the approximator; other names of it are the same.
_A = "distilled_guidance_layer"
CHROMA_TABLE = KeyTable(
    (
        same(f"{_A}.in_proj.", f"{_A}.in_proj."),
        same(f"{_A}.out_proj.", f"{_A}.out_proj."),
        same(f"{_A}.layers.*.in_layer.", f"{_A}.layers.*.linear_1."),
        same(f"{_A}.layers.*.out_layer.", f"{_A}.layers.*.linear_2."),
        same(f"{_A}.norms.*.scale", f"{_A}.norms.*.weight"),
        *_COMMON,
    ),
    original_blocks="double_blocks.",
    blocks="transformer_blocks.",
)
_FLUX_NETWORK = FileComponent(
    name="transformer",
    class_name="FluxTransformer2DModel",
    prefix=UNET,
    config=infer_config.flux_fields,
    read=FLUX_TABLE.from_original,
    write=FLUX_TABLE.to_original,
)
_CHROMA_NETWORK = replace(
    _FLUX_NETWORK,
    class_name="ChromaTransformer2DModel",
    config=infer_config.chroma_fields,
    read=CHROMA_TABLE.from_original,
    write=CHROMA_TABLE.to_original,
)
_VAE_FIELDS = {"sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159}
DEV = SingleFileLayout(
    name="FLUX.1 dev",
    pipeline="FluxPipeline",
    components=(
        _FLUX_NETWORK,
        layout_parts.vae({}),
        layout_parts.clip_l(projects=False),
        layout_parts.t5("_2"),
    ),
    scheduler=layout_parts.flow_scheduler(3.0, dynamic=True),
    fields={"vae": _VAE_FIELDS, "text_encoder": {"hidden_act": "quick_gelu"}},
    stores_schedule=False,
    alternatives=ALTERNATIVES,
)
SCHNELL = replace(DEV, name="FLUX.1 schnell", scheduler=layout_parts.flow_scheduler(1.0))
FILL = replace(DEV, name="FLUX.1 Fill", pipeline="FluxFillPipeline", alternatives=())
CONTROL = replace(
    DEV,
    name="FLUX.1 Canny or Depth",
    pipeline=CONTROL_PIPELINES[0],
    alternatives=CONTROL_PIPELINES[1:],
)
# By columns of what the network takes: the noisy latents, 64, and what comes beside them.
WIDER = {128: CONTROL, 384: FILL}
CHROMA = SingleFileLayout(
    name="Chroma",
    pipeline="ChromaPipeline",
    components=(_CHROMA_NETWORK, layout_parts.vae({}), layout_parts.t5("")),
    scheduler=layout_parts.flow_scheduler(3.0, dynamic=True),
    fields={"vae": _VAE_FIELDS},
    stores_schedule=False,
    alternatives=CHROMA_PIPELINES[1:],
)


def detect(entries: Entries, prediction_type: str | None = None) -> SingleFileLayout | None:
    """The layout of a file of FLUX.1 or Chroma; None for others, InputError for a variant."""
    del prediction_type  # of others, whose files are of two kinds
    original = layout_parts.prefix_with(entries, ORIGINAL)
    prefix = layout_parts.prefix_with(entries, DIFFUSERS) if original is None else original
    if prefix is None:
        return None
    chroma = f"{prefix}{APPROXIMATOR}" in entries
    layout = CHROMA if chroma else _flux(entries, prefix, original=original is not None)
    network, _, *texts = layout.components
    if original is None:
        network = replace(network, read=dict, write=dict)
    own = (replace(network, prefix=prefix), layout_parts.vae(entries), *texts)
    return replace(layout, components=own)


def _flux(entries: Entries, prefix: str, *, original: bool) -> SingleFileLayout:
    """Which FLUX.1 it is, by the channels that it takes and whether it takes a guidance scale."""
    inputs = entries[f"{prefix}{'img_in' if original else 'x_embedder'}.weight"]
    columns = inputs.shape[-1] if inputs.shape else 0
    if columns in UNSUPPORTED:
        raise InputError(
            f"{inputs.path}: got {UNSUPPORTED[columns]}, which is not supported, expected FLUX.1 "
            "with 64 channels, 128 for Canny and Depth, or 384 for Fill"
        )
    guidance = "guidance_in" if original else "time_text_embed.guidance_embedder"
    if columns in WIDER:
        return WIDER[columns]
    return DEV if any(name.startswith(f"{prefix}{guidance}.") for name in entries) else SCHNELL


def layout_for(
    class_name: str, configs: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> SingleFileLayout:
    """The layout in which a pipeline is written."""
    del scheduler  # which no file has
    if class_name in CHROMA_PIPELINES:
        return CHROMA
    for layout in WIDER.values():
        if class_name in (layout.pipeline, *layout.alternatives):
            return layout
    return DEV if getattr(configs.get("transformer"), "guidance_embeds", True) else SCHNELL
