"""Single files of GLIDE (2112.10741): base, upsampler, and both for inpainting.

The original network is one: a UNet, and among its tensors those of the transformer that reads the
text. Here they are two components.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from jaxdiff.checkpoints import guided_diffusion, infer_config
from jaxdiff.checkpoints.key_tables import KeyTable, Rule, heads, same
from jaxdiff.checkpoints.single_file_layouts import Entries, FileComponent, SingleFileLayout
from jaxdiff.core.errors import InputError

PIPELINES = ("GlidePipeline",)
TEXT_MODEL = "GlideTextModel"
TEXT = "text_encoder."  # before its names, of which only a file that is read has it
IMAGE_CHANNELS = 3
MASK_CHANNELS = 4  # those of a masked image, and its mask
KEYS = ("input_blocks.0.0.weight", "transformer_proj.weight", "padding_embedding")
BASE_SIZE, UPSAMPLED_SIZE = 64, 256
_B, _L = "transformer.resblocks.*", "encoder.layers.*"


def _text_rules() -> Iterable[Rule]:
    yield same("token_embedding.weight", "embeddings.token_embedding.weight")
    yield same("positional_embedding", "embeddings.position_embedding.weight")
    yield same("padding_embedding", "embeddings.padding_embedding.weight")
    yield same("final_ln.", "final_layer_norm.")
    yield same("transformer_proj.", "text_projection.")
    parts = [f"{_L}.self_attn.{x}_proj." for x in "qkv"]
    yield heads(f"{_B}.attn.c_qkv.", *parts, width=infer_config.HEAD_WIDTH)
    yield same(f"{_B}.attn.c_proj.", f"{_L}.self_attn.out_proj.")
    yield same(f"{_B}.ln_1.", f"{_L}.layer_norm1.")
    yield same(f"{_B}.ln_2.", f"{_L}.layer_norm2.")
    yield same(f"{_B}.mlp.c_fc.", f"{_L}.mlp.fc1.")
    yield same(f"{_B}.mlp.c_proj.", f"{_L}.mlp.fc2.")


_TABLE = KeyTable(
    tuple(_text_rules()), original_blocks="transformer.resblocks.", blocks="encoder.layers."
)
# How the names of the transformer's tensors begin.
_BEGINNINGS = tuple(rule.original.partition("*")[0].rstrip(".") for rule in _text_rules())
_NETWORK = FileComponent(
    name="unet",
    class_name="UNet2DConditionModel",
    prefix="",
    config=infer_config.guided_unet_fields,
    read=guided_diffusion.unet_from_original,
    write=guided_diffusion.unet_to_original,
)
_TEXT_ENCODER = FileComponent(
    name="text_encoder",
    class_name=TEXT_MODEL,
    prefix="",
    config=infer_config.glide_text_fields,
    read=_TABLE.from_original,
    write=_TABLE.to_original,
    tokenizer="tokenizer",
)
_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "timestep_spacing": "linspace",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
}
# The pooled embedding of the text joins that of the time as it is.
_FIELDS = {"class_embed_type": "identity", "learned_variance": True}
BASE_SCHEDULER: dict[str, Any] = {
    **_SCHEDULER,
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
}
UPSAMPLER_SCHEDULER: dict[str, Any] = {
    **_SCHEDULER,
    "_class_name": "DDIMScheduler",
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}
_BASE = SingleFileLayout(
    name="GLIDE",
    pipeline=PIPELINES[0],
    components=(_NETWORK, _TEXT_ENCODER),
    scheduler=BASE_SCHEDULER,
    fields={"unet": {**_FIELDS, "sample_size": BASE_SIZE}},
)
_UPSAMPLER = replace(
    _BASE,
    name="GLIDE upsampler",
    scheduler=UPSAMPLER_SCHEDULER,
    fields={"unet": {**_FIELDS, "sample_size": UPSAMPLED_SIZE}},
)


def _layout(in_channels: int) -> SingleFileLayout:
    """The layout of a network that takes so many channels."""
    base = in_channels in (IMAGE_CHANNELS, IMAGE_CHANNELS + MASK_CHANNELS)
    return _BASE if base else _UPSAMPLER


def detect(entries: Entries, prediction_type: str | None = None) -> SingleFileLayout | None:
    """The layout of a file of GLIDE; None for others."""
    del prediction_type  # of others, whose files are of two kinds
    if not all(name in entries for name in KEYS) or len(entries[KEYS[0]].shape) != 4:
        return None
    text = [name for name in entries if name.startswith(_BEGINNINGS)]
    layout = _layout(entries[KEYS[0]].shape[1])
    return replace(
        layout,
        components=(_NETWORK, replace(_TEXT_ENCODER, prefix=TEXT)),
        moved={name: f"{TEXT}{name}" for name in text},
    )


def layout_for(
    class_name: str, configs: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> SingleFileLayout:
    """The layout in which a pipeline is written; InputError for heads of another width."""
    del class_name, scheduler
    unet, text = configs["unet"], configs["text_encoder"]
    for name, width in (
        ("unet", unet.attention_head_dim),
        ("text_encoder", text.hidden_size // text.num_attention_heads),
    ):
        if width != infer_config.HEAD_WIDTH:
            raise InputError(
                f"{name}: got attention heads of width {width}, expected "
                f"{infer_config.HEAD_WIDTH}, as all single files of GLIDE have"
            )
    return _layout(unet.in_channels)
