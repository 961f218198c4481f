"""The configs of networks read off the shapes of their tensors, for files that come without.

Names are those of diffusers and transformers. What no shape shows (heads, activations, scaling
factors) is the same in all published Stable Diffusion models of a family, and given by the caller.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from jaxdiff.checkpoints.safetensors import TensorInfo
from jaxdiff.core.errors import InputError
from jaxdiff.models.autoencoder_tiny import AutoencoderTinyConfig
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.vae import AutoencoderKLConfig

HEAD_WIDTH = 64  # of attention heads everywhere but in the UNet of Stable Diffusion 1
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


def unet_config(
    entries: Mapping[str, TensorInfo], *, heads: int | None, sample_size: int
) -> UNet2DConditionConfig:
    """The config of a UNet; `heads` None: as many heads of HEAD_WIDTH as fit into each stage."""
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
    return UNet2DConditionConfig(
        sample_size=sample_size,
        in_channels=tensor_shape(entries, "conv_in.weight", 4)[1],
        out_channels=tensor_shape(entries, "conv_out.weight", 4)[0],
        down_block_types=tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in up),
        block_out_channels=channels,
        layers_per_block=count_modules(entries, "down_blocks.0.resnets."),
        transformer_layers_per_block=attending[0] if uniform else tuple(d or 1 for d in depths),
        cross_attention_dim=tensor_shape(entries, inside, 2)[1],
        attention_head_dim=heads or tuple(max(1, c // HEAD_WIDTH) for c in channels),
        use_linear_projection=len(entries[f"{first}proj_in.weight"].shape) == 2,
        **options,
    )


def vae_config(
    entries: Mapping[str, TensorInfo], *, sample_size: int, **latents: Any
) -> AutoencoderKLConfig:
    """The config of an AutoencoderKL; `latents` are its fields that say how latents are scaled."""
    stages = count_modules(entries, "encoder.down_blocks.")
    return AutoencoderKLConfig(
        block_out_channels=tuple(
            tensor_shape(entries, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4)[0]
            for i in range(stages)
        ),
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=count_modules(entries, "encoder.down_blocks.0.resnets."),
        latent_channels=tensor_shape(entries, "decoder.conv_in.weight", 4)[1],
        sample_size=sample_size,
        use_quant_conv="quant_conv.weight" in entries,
        use_post_quant_conv="post_quant_conv.weight" in entries,
        mid_block_add_attention=any(".mid_block.attentions." in name for name in entries),
        **latents,
    )


def tiny_vae_config(entries: Mapping[str, TensorInfo]) -> AutoencoderTinyConfig:
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
    return AutoencoderTinyConfig(**fields)


def text_config(
    entries: Mapping[str, TensorInfo], *, hidden_act: str, projection_dim: int | None = None
) -> CLIPTextConfig:
    """The config of a CLIP text encoder, saying bos 0 and eos 2 as all of Stable Diffusion's do."""
    words, width = tensor_shape(entries, "text_model.embeddings.token_embedding.weight", 2)
    positions, _ = tensor_shape(entries, "text_model.embeddings.position_embedding.weight", 2)
    inner, _ = tensor_shape(entries, "text_model.encoder.layers.0.mlp.fc1.weight", 2)
    if "text_projection.weight" in entries:
        projection_dim = tensor_shape(entries, "text_projection.weight", 2)[0]
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=inner,
        projection_dim=projection_dim or width,
        num_hidden_layers=count_modules(entries, "text_model.encoder.layers."),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=positions,
        hidden_act=hidden_act,
        bos_token_id=0,
        eos_token_id=2,
    )
