"""Small random models of GLIDE, and files of a vocabulary for them."""

import dataclasses
import json

import tiny

from jaxdiff.checkpoints.glide_vocabulary import END, tokenizer_beside
from jaxdiff.checkpoints.layout_glide import layout_for
from jaxdiff.checkpoints.pipelines import PipelineComponents
from jaxdiff.models.glide_text.config import GlideTextConfig
from jaxdiff.models.glide_text.module import GlideTextModel
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel

MERGES = ("Ġ a", "r e", "re d", "Ġ red", "a t", "c at", "Ġ cat")
LENGTH = 12  # tokens of a text


def vocabulary():
    """Ids of the bytes in GPT-2's spelling, of what is merged of them, and of the end."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in spelled)
    spelled |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = [*spelled.values(), *(pair.replace(" ", "") for pair in MERGES), END]
    return {token: i for i, token in enumerate(tokens)}


def write_vocabulary(folder, names=("vocab.json", "merges.txt"), compress=bytes):
    """The two files of a tokenizer."""
    folder.mkdir(exist_ok=True)
    merges = "\n".join(["#version: 0.2", *MERGES, ""])
    texts = json.dumps(vocabulary(), ensure_ascii=False), merges
    for name, text in zip(names, texts, strict=True):
        (folder / name).write_bytes(compress(text.encode()))
    return folder


UNET = UNet2DConditionConfig(
    sample_size=64,
    in_channels=3,
    out_channels=6,
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    block_out_channels=(32, 64),
    layers_per_block=1,
    cross_attention_dim=64,
    attention_head_dim=64,
    resnet_time_scale_shift="scale_shift",
    class_embed_type="identity",
    learned_variance=True,
)
TEXT = GlideTextConfig(
    vocab_size=len(vocabulary()),
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=1,
    max_position_embeddings=LENGTH,
    projection_dim=128,
    pad_token_id=len(vocabulary()) - 1,
)


def parts(folder, in_channels=3):
    """A base with 3 or 7 channels, or an upsampler with 6 or 10."""
    config = UNET if in_channels in (3, 7) else dataclasses.replace(UNET, sample_size=256)
    components = {
        "unet": tiny.random_component(
            UNet2DConditionModel, dataclasses.replace(config, in_channels=in_channels), seed=1
        ),
        "text_encoder": tiny.random_component(GlideTextModel, TEXT, seed=2),
    }
    configs = {name: part.module.config for name, part in components.items()}
    files = tokenizer_beside(write_vocabulary(folder) / "x.safetensors")
    assert files is not None
    return PipelineComponents(
        class_name="GlidePipeline",
        components=components,
        scheduler=layout_for("GlidePipeline", configs, {}).scheduler,
        tokenizers={"tokenizer": files},
        defaults={"height": 8, "width": 8, "steps": 3},
    )
