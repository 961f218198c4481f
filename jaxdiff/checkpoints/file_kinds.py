"""What a file holds that is no model which can be loaded, told by names of tensors alone."""

import re
from collections.abc import Iterable, Mapping

from jaxdiff.checkpoints.single_file_layouts import UNET

# Families that are not loaded, by how a tensor of theirs begins, with or without the UNet's prefix.
# The first one that fits counts.
OTHER_FAMILIES: Mapping[str, str] = {
    "embedder.model.visual.": "Stable unCLIP",
    "input_blocks.8.0.time_mixer.": "Stable Video Diffusion",
    "input_blocks.10.0.skip_connection.": "the Stable Diffusion x4 upscaler",
    "double_stream_modulation_img.": "FLUX.2",
    "nerf_final_layer_conv.": "Chroma Radiance",
    "txt_in.individual_token_refiner.": "HunyuanVideo",
    "double_blocks.0.img_mlp.gate_proj.": "Ovis-Image",
    "layers.0.adaLN_modulation.0.": "Z-Image",
    "cap_embedder.": "Lumina",
    "transformer_blocks.0.img_mod.": "Qwen-Image",
    "blocks.0.mlp.inverted_conv.": "Sana",
    "blocks.0.cross_attn.q_linear.": "PixArt",
    "double_layers.0.attn.w1q.": "AuraFlow",
    "mlp_t5.0.": "HunyuanDiT",
    "clf.1.": "Stable Cascade",
    "clip_txt_mapper.": "Stable Cascade",
    "t5_yproj.": "Mochi",
    "patchify_proj.": "LTX-Video",
    "head.modulation": "Wan",
    "double_stream_blocks.0.block.": "HiDream",
    "net.x_embedder.proj.1.": "Cosmos",
    "model.clip_img_proj.": "the prior of Kandinsky 2 or Karlo",
    "clip_img_proj.": "the prior of Kandinsky 2 or Karlo",
    "blocks.0.cross_attn.q.": "Wan",
}
# Tensors of the networks of whole models, with or without the UNet's prefix.
_NETWORKS = (
    "double_blocks.0.img_attn.qkv.weight",
    "joint_blocks.0.x_block.attn.qkv.weight",
    "single_transformer_blocks.0.attn.to_q.weight",
    "transformer_blocks.0.attn.add_q_proj.weight",
)
# Before the names of such networks in LoRAs, which may have underscores for dots.
_LORA_PREFIXES = re.compile(
    r"(lora_(unet|transformer)_|lycoris_|base_model\.model\.|transformer\.|diffusion_model\.)+"
)
# Names of a VAE alone, TAESD's own among them.
_VAE_NAMES = re.compile(
    r"(\w+\.)?decoder\.(conv_in|layers\.0)\.weight|(taesd_(en|de)coder\.)?\d+\.conv\.0\.weight"
)
# A tensor of each text encoder, bare or as ComfyUI has them below a prefix.
_TEXT_ENCODERS = {
    "T5EncoderModel": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "CLIPTextModel": "text_model.encoder.layers.0.self_attn.q_proj.weight",
}
_SHARD = re.compile(r"-\d+-of-0*(?:[2-9]|[1-9]\d+)\.\w+$")
TEXT_PREFIX = re.compile(r"text_encoders\.\w+\.transformer\.")


def unsupported_family(names: Iterable[str]) -> str | None:
    """The family of a model or LoRA with these names, if it is not loaded; None for others."""
    plain = {name.removeprefix(UNET) for name in names}
    plain |= {_flat(_LORA_PREFIXES.sub("", n)) for n in plain if _LORA_PREFIXES.match(n)}
    for beginning, family in OTHER_FAMILIES.items():
        if any(name.startswith((beginning, _flat(beginning))) for name in plain):
            return family
    return None


def _flat(name: str) -> str:
    return name.replace(".", "_")


def is_vae_alone(names: Iterable[str]) -> bool:
    """Whether these are names of a VAE, and none of a UNet."""
    names = list(names)
    return any(map(_VAE_NAMES.fullmatch, names)) and not any(n.startswith(UNET) for n in names)


def text_encoder_alone(names: Iterable[str]) -> str | None:
    """The class of the text encoder with these names; None for others.

    Whoever asks knows that they are not those of a whole model.
    """
    plain = {TEXT_PREFIX.sub("", name) for name in names}
    return next((kind for kind, name in _TEXT_ENCODERS.items() if name in plain), None)


def is_shard(path: str) -> bool:
    """Whether a path is named as one of several files of a component."""
    return _SHARD.search(path) is not None


def kind_of_model(names: Iterable[str]) -> str | None:
    """What a file is that should be something small, if it is a model; None for others."""
    names = set(names)
    networks = {f"{prefix}{name}" for prefix in ("", UNET) for name in _NETWORKS}
    if f"{UNET}input_blocks.0.0.weight" in names or names & networks:
        return "a whole model"
    return "a VAE" if is_vae_alone(names) else None
