"""The configs of networks read off the shapes of their tensors, for files that come without.

Names of tensors and of the fields in the result are those of diffusers and transformers. What no
shape shows (heads, activations, scaling factors) is the same in all published models of a family,
and added by the caller. No jax here.
"""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxdiff.checkpoints.safetensors import TensorInfo
from jaxdiff.core.errors import InputError

HEAD_WIDTH = 64  # of attention heads everywhere but in the UNet of Stable Diffusion 1
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # S, B, L, XL (2212.09748, table 1)
TIME_WIDTH = 256  # of each embedded size of Stable Diffusion XL


def count_modules(entries: Mapping[str, TensorInfo], prefix: str) -> int:
    """How many numbered modules follow `prefix` ("down_blocks."): the highest number plus one."""
    numbers = {
        int(m[1]) for name in entries if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))
    }
    return max(numbers, default=-1) + 1


def tensor_shape(entries: Mapping[str, TensorInfo], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there with so many dimensions; else InputError."""
    if name not in entries:
        source = next(iter(entries.values())).path if entries else "checkpoint"
        raise InputError(f"{source}: missing tensors: got no {name}, expected one")
    entry = entries[name]
    if len(entry.shape) != ndim:
        raise InputError(f"{entry.path}: {entry.name}: got {entry.shape}, expected {ndim} axes")
    return entry.shape


def unet_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of a UNet2DConditionModel, with as many heads of HEAD_WIDTH as fit each stage."""
    stages = range(count_modules(entries, "down_blocks."))
    channels = tuple(
        tensor_shape(entries, f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in stages
    )
    depths = tuple(
        count_modules(entries, f"down_blocks.{i}.attentions.0.transformer_blocks.") for i in stages
    )
    attending = [depth for depth in depths if depth]
    if not attending:
        raise InputError(
            f"{next(iter(entries.values())).path}: got no attention, expected a UNet with some"
        )
    first = f"down_blocks.{depths.index(attending[0])}.attentions.0."
    inside = f"{first}transformer_blocks.0.attn2.to_k.weight"
    uniform = len(set(attending)) == 1
    up = [count_modules(entries, f"up_blocks.{i}.attentions.") > 0 for i in stages]
    options = {}
    if "add_embedding.linear_1.weight" in entries:
        options = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_WIDTH,
            "projection_class_embeddings_input_dim": tensor_shape(
                entries, "add_embedding.linear_1.weight", 2
            )[1],
        }
    return {
        "in_channels": tensor_shape(entries, "conv_in.weight", 4)[1],
        "out_channels": tensor_shape(entries, "conv_out.weight", 4)[0],
        "down_block_types": tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in up),
        "block_out_channels": channels,
        "layers_per_block": count_modules(entries, "down_blocks.0.resnets."),
        "transformer_layers_per_block": attending[0] if uniform else tuple(d or 1 for d in depths),
        "cross_attention_dim": tensor_shape(entries, inside, 2)[1],
        "attention_head_dim": tuple(max(1, c // HEAD_WIDTH) for c in channels),
        "use_linear_projection": len(entries[f"{first}proj_in.weight"].shape) == 2,
        **options,
    }


def guided_unet_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of a UNet2DConditionModel of guided diffusion that attends to a context too."""
    stages = range(count_modules(entries, "down_blocks."))
    attends = [count_modules(entries, f"down_blocks.{i}.attentions.") > 0 for i in stages]
    down, up = (
        ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    )
    context = tensor_shape(entries, "mid_block.attentions.0.add_k_proj.weight", 2)[1]
    return {
        "in_channels": tensor_shape(entries, "conv_in.weight", 4)[1],
        "out_channels": tensor_shape(entries, "conv_out.weight", 4)[0],
        "down_block_types": tuple(down[attend] for attend in attends),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": tuple(up[attend] for attend in reversed(attends)),
        "block_out_channels": tuple(
            tensor_shape(entries, f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in stages
        ),
        "layers_per_block": count_modules(entries, "down_blocks.0.resnets."),
        "cross_attention_dim": context,
        "attention_head_dim": HEAD_WIDTH,
        "resnet_time_scale_shift": "scale_shift",
    }


def vae_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of an AutoencoderKL."""
    stages = count_modules(entries, "encoder.down_blocks.")

    def types(blocks: str, kind: str) -> tuple[str, ...]:
        counts = (count_modules(entries, f"{blocks}.{i}.attentions.") for i in range(stages))
        return tuple(f"Attn{kind}" if count else kind for count in counts)

    return {
        "block_out_channels": tuple(
            tensor_shape(entries, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4)[0]
            for i in range(stages)
        ),
        "down_block_types": types("encoder.down_blocks", "DownEncoderBlock2D"),
        "up_block_types": types("decoder.up_blocks", "UpDecoderBlock2D"),
        "layers_per_block": count_modules(entries, "encoder.down_blocks.0.resnets."),
        "latent_channels": tensor_shape(entries, "decoder.conv_in.weight", 4)[1],
        "use_quant_conv": "quant_conv.weight" in entries,
        "use_post_quant_conv": "post_quant_conv.weight" in entries,
        "mid_block_add_attention": any(".mid_block.attentions." in name for name in entries),
    }


def vq_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of a VQModel."""
    fields = vae_fields(entries)
    del fields["use_quant_conv"], fields["use_post_quant_conv"]  # which it always has
    return fields | {"num_vq_embeddings": tensor_shape(entries, "quantize.embedding.weight", 2)[0]}


def class_conditional_unet_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of a ClassConditionalUNet2DModel."""
    table = tensor_shape(entries, "class_embedder.embedding_table.weight", 2)
    return unet_fields(entries) | {"num_classes": table[0] - 1}  # without the null class


def tiny_vae_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of an AutoencoderTiny: stages are the blocks between two plain convolutions."""
    fields: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        layers = f"{half}.layers."
        plain = [
            i for i in range(count_modules(entries, layers)) if f"{layers}{i}.weight" in entries
        ]
        stages = [range(a, b) for a, b in itertools.pairwise(plain)]
        blocks = [sum(f"{layers}{i}.conv.0.weight" in entries for i in s) for s in stages]
        width, channels, *_ = tensor_shape(entries, f"{layers}0.weight", 4)
        last = tensor_shape(entries, f"{layers}{plain[-1]}.weight", 4)[0]
        fields[f"{half}_block_out_channels"] = (width,) * len(blocks)
        fields[f"num_{half}_blocks"] = tuple(blocks)
        if half == "encoder":
            fields["in_channels"] = channels
        else:
            fields |= {"latent_channels": channels, "out_channels": last}
    return fields


def clip_text_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of a CLIP text encoder, saying bos 0 and eos 2 as all of Stable Diffusion's do.

    The projection is as wide as the states if there is none.
    """
    words, width = tensor_shape(entries, "text_model.embeddings.token_embedding.weight", 2)
    positions, _ = tensor_shape(entries, "text_model.embeddings.position_embedding.weight", 2)
    inner, _ = tensor_shape(entries, "text_model.encoder.layers.0.mlp.fc1.weight", 2)
    projection_dim = width
    if "text_projection.weight" in entries:
        projection_dim = tensor_shape(entries, "text_projection.weight", 2)[0]
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": inner,
        "projection_dim": projection_dim,
        "num_hidden_layers": count_modules(entries, "text_model.encoder.layers."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": positions,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def t5_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of a T5EncoderModel of version 1.1, whose feed-forward layers are gated."""
    words, width = tensor_shape(entries, "shared.weight", 2)
    first = "encoder.block.0.layer"
    buckets, heads = tensor_shape(
        entries, f"{first}.0.SelfAttention.relative_attention_bias.weight", 2
    )
    return {
        "vocab_size": words,
        "d_model": width,
        "d_kv": tensor_shape(entries, f"{first}.0.SelfAttention.q.weight", 2)[0] // heads,
        "d_ff": tensor_shape(entries, f"{first}.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_layers": count_modules(entries, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def sd3_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of an SD3Transformer2DModel, with heads of HEAD_WIDTH where no norm shows it."""
    width, channels, patch, _ = tensor_shape(entries, "pos_embed.proj.weight", 4)
    head = _head_width(entries, "transformer_blocks.0.attn.norm_q.weight", HEAD_WIDTH)
    context, tokens = tensor_shape(entries, "context_embedder.weight", 2)
    depth = count_modules(entries, "transformer_blocks.")
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": tensor_shape(entries, "proj_out.weight", 2)[0] // patch**2,
        "num_layers": depth,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": tokens,
        "caption_projection_dim": context,
        "pooled_projection_dim": tensor_shape(
            entries, "time_text_embed.text_embedder.linear_1.weight", 2
        )[1],
        "pos_embed_max_size": math.isqrt(tensor_shape(entries, "pos_embed.pos_embed", 3)[1]),
        "dual_attention_layers": tuple(
            i for i in range(depth) if f"transformer_blocks.{i}.attn2.to_q.weight" in entries
        ),
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in entries else None,
    }


def flux_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of a FluxTransformer2DModel."""
    return _flux(entries) | {
        "pooled_projection_dim": tensor_shape(
            entries, "time_text_embed.text_embedder.linear_1.weight", 2
        )[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in entries,
    }


def chroma_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of a ChromaTransformer2DModel."""
    hidden, channels = tensor_shape(entries, "distilled_guidance_layer.in_proj.weight", 2)
    return _flux(entries) | {
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": count_modules(entries, "distilled_guidance_layer.layers."),
    }


def _flux(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What FLUX.1 and Chroma have in common; positions are those of the published models."""
    width, channels = tensor_shape(entries, "x_embedder.weight", 2)
    head = _head_width(entries, "transformer_blocks.0.attn.norm_q.weight", 128)
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": tensor_shape(entries, "proj_out.weight", 2)[0],
        "num_layers": count_modules(entries, "transformer_blocks."),
        "num_single_layers": count_modules(entries, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": tensor_shape(entries, "context_embedder.weight", 2)[1],
    }


def dit_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of a DiTTransformer2DModel, with the heads of the published models by width."""
    width, channels, patch, _ = tensor_shape(entries, "pos_embed.proj.weight", 4)
    heads = DIT_HEADS.get(width, max(1, width // HEAD_WIDTH))
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": tensor_shape(entries, "proj_out_2.weight", 2)[0] // patch**2,
        "num_layers": count_modules(entries, "transformer_blocks."),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_embeds_ada_norm": tensor_shape(entries, table, 2)[0] - 1,  # without the null class
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "attention_bias": True,
    }


def _head_width(entries: Mapping[str, TensorInfo], norm: str, default: int) -> int:
    """The width of a head of attention, which the norm of its queries has."""
    return tensor_shape(entries, norm, 1)[0] if norm in entries else default


def ldm_bert_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of an LDMBertModel, with heads of HEAD_WIDTH."""
    words, width = tensor_shape(entries, "model.embed_tokens.weight", 2)
    layer = "model.layers.0"
    return {
        "vocab_size": words,
        "d_model": width,
        "max_position_embeddings": tensor_shape(entries, "model.embed_positions.weight", 2)[0],
        "encoder_layers": count_modules(entries, "model.layers."),
        "encoder_ffn_dim": tensor_shape(entries, f"{layer}.fc1.weight", 2)[0],
        "encoder_attention_heads": max(
            1, tensor_shape(entries, f"{layer}.self_attn.q_proj.weight", 2)[0] // HEAD_WIDTH
        ),
        "head_dim": HEAD_WIDTH,
    }


def glide_text_fields(entries: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config of a GlideTextModel, with heads of HEAD_WIDTH; the last token is padding."""
    words, width = tensor_shape(entries, "embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": count_modules(entries, "encoder.layers."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": tensor_shape(entries, "embeddings.position_embedding.weight", 2)[
            0
        ],
        "projection_dim": tensor_shape(entries, "text_projection.weight", 2)[0],
        "pad_token_id": words - 1,
    }
