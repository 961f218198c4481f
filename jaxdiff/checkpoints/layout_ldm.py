"""Single files of latent diffusion (2112.10752): text to image and classes to image."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from jaxdiff.checkpoints import infer_config, ldm_reader, ldm_writer
from jaxdiff.checkpoints.key_tables import KeyTable, Rule, same
from jaxdiff.checkpoints.layout_parts import UNET_PART
from jaxdiff.checkpoints.safetensors import TensorInfo
from jaxdiff.checkpoints.single_file_layouts import (
    UNET,
    VAE,
    Entries,
    FileComponent,
    SingleFileLayout,
    Tensors,
)
from jaxdiff.core.errors import InputError

TEXT_PIPELINE = "LDMTextToImagePipeline"
CLASS_PIPELINE = "LDMClassConditionalPipeline"
PIPELINES = (TEXT_PIPELINE, CLASS_PIPELINE)
BERT = "cond_stage_model.transformer."
_BERT_KEY = f"{BERT}token_emb.weight"
_CLASSES = "cond_stage_model.embedding.weight"
_FIRST = f"{UNET}input_blocks.0.0.weight"
# x-transformers counts attention and feed-forward layers through; here they are pairs.
_LAYER = re.compile(r"attn_layers\.layers\.(\d+)\.(.+)")
_PAIR = re.compile(r"pairs\.(\d+)\.([ab])\.(.+)")
_P, _L = "pairs.*", "model.layers.*"


def _bert_rules() -> Iterable[Rule]:
    yield same("token_emb.", "model.embed_tokens.")
    yield same("pos_emb.emb.", "model.embed_positions.")
    yield same("norm.", "model.layer_norm.")
    yield same("to_logits.", "to_logits.")
    yield same(f"{_P}.a.0.", f"{_L}.self_attn_layer_norm.")
    for x in "qkv":
        yield same(f"{_P}.a.1.to_{x}.", f"{_L}.self_attn.{x}_proj.")
    yield same(f"{_P}.a.1.to_out.", f"{_L}.self_attn.out_proj.")
    yield same(f"{_P}.b.0.", f"{_L}.final_layer_norm.")
    yield same(f"{_P}.b.1.net.0.0.", f"{_L}.fc1.")
    yield same(f"{_P}.b.1.net.2.", f"{_L}.fc2.")


_BERT = KeyTable(tuple(_bert_rules()), original_blocks="pairs.", blocks="model.layers.")


def bert_from_original(entries: Entries) -> dict[str, TensorInfo]:
    """The tensors of x-transformers' encoder under the names of diffusers' LDMBertModel."""
    return _BERT.from_original({_LAYER.sub(_paired, name): e for name, e in entries.items()})


def bert_to_original(tensors: Tensors) -> dict[str, Any]:
    """The tensors of an LDMBertModel in the names of x-transformers."""
    return {_PAIR.sub(_single, name): t for name, t in _BERT.to_original(tensors).items()}


def _paired(match: re.Match[str]) -> str:
    pair, second = divmod(int(match[1]), 2)
    return f"pairs.{pair}.{'ab'[second]}.{match[2]}"


def _single(match: re.Match[str]) -> str:
    return f"attn_layers.layers.{2 * int(match[1]) + (match[2] == 'b')}.{match[3]}"


# Betas of configs/latent-diffusion/txt2img-1p4B-eval.yaml, where the roots of betas are linear.
_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
}
TEXT_TO_IMAGE = SingleFileLayout(
    name="LDM text to image",
    pipeline=TEXT_PIPELINE,
    components=(
        UNET_PART,
        FileComponent(
            name="vqvae",
            class_name="AutoencoderKL",
            prefix=VAE,
            config=infer_config.vae_fields,
            read=ldm_reader.vae_from_ldm,
            write=ldm_writer.vae_to_ldm,
        ),
        FileComponent(
            name="bert",
            class_name="LDMBertModel",
            prefix=BERT,
            config=infer_config.ldm_bert_fields,
            read=bert_from_original,
            write=bert_to_original,
            tokenizer="tokenizer",
        ),
    ),
    scheduler=_SCHEDULER,
    fields={
        "unet": {"sample_size": 32, "attention_head_dim": 8},
        "vqvae": {"sample_size": 256, "scaling_factor": 0.18215},
    },
)
# The table of classes, which is beside the UNet there, is one of its layers here.
CLASS_CONDITIONAL = SingleFileLayout(
    name="class-conditional LDM",
    pipeline=CLASS_PIPELINE,
    components=(
        replace(
            UNET_PART,
            class_name="ClassConditionalUNet2DModel",
            config=infer_config.class_conditional_unet_fields,
        ),
        FileComponent(
            name="vqvae",
            class_name="VQModel",
            prefix=VAE,
            config=infer_config.vq_fields,
            read=ldm_reader.vae_from_ldm,
            write=ldm_writer.vae_to_ldm,
        ),
    ),
    # configs/latent-diffusion/cin256-v2.yaml, whose latents are not rescaled
    scheduler=_SCHEDULER | {"beta_start": 0.0015, "beta_end": 0.0195},
    fields={
        "unet": {"sample_size": 64, "attention_head_dim": 1},
        "vqvae": {"sample_size": 256, "scaling_factor": 1.0},
    },
    moved={_CLASSES: f"{UNET}class_embedder.embedding_table.weight"},
)


def detect(entries: Entries, prediction_type: str | None = None) -> SingleFileLayout | None:
    """The layout of a file of latent diffusion; None for others."""
    del prediction_type  # of others, whose files are of two kinds
    layouts = {_BERT_KEY: TEXT_TO_IMAGE, _CLASSES: CLASS_CONDITIONAL}
    found = (layout for name, layout in layouts.items() if name in entries)
    return next(found, None) if _FIRST in entries else None


def layout_for(
    class_name: str, configs: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> SingleFileLayout:
    """The layout in which a pipeline is written; InputError without its text encoder."""
    del scheduler
    if class_name == CLASS_PIPELINE:
        return CLASS_CONDITIONAL
    if "bert" not in configs:
        raise InputError("bert: got none, expected the text encoder of latent diffusion")
    return TEXT_TO_IMAGE
