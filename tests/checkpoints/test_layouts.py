"""Which layout a file has, told by its names, and what of it the layouts read."""

import numpy as np
import pytest
from original_keys import entries, entry, oracle

from jaxdiff.checkpoints import (
    infer_config,
    layout_dit,
    layout_flux,
    layout_ldm,
    layout_parts,
    layout_registry,
    layout_sd3,
    layout_stable_diffusion,
)
from jaxdiff.checkpoints.safetensors import LazyTensor, read_tensor
from jaxdiff.checkpoints.single_file_layouts import UNET
from jaxdiff.core.errors import InputError

MODULES = layout_registry.LAYOUT_MODULES
LAYOUTS = {
    "sd3_medium": ("Stable Diffusion 3", "StableDiffusion3Pipeline"),
    "sd35_medium": ("Stable Diffusion 3.5", "StableDiffusion3Pipeline"),
    "sd35_large": ("Stable Diffusion 3.5", "StableDiffusion3Pipeline"),
    "flux_dev": ("FLUX.1 dev", "FluxPipeline"),
    "chroma": ("Chroma", "ChromaPipeline"),
    "dit_xl_2_256": ("DiT", "DiTPipeline"),
}


def detected(found):
    """The layouts that recognise a file."""
    return [layout for module in MODULES if (layout := module.detect(found)) is not None]


@pytest.mark.parametrize("prefix", ["", UNET])
@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_network_has_one_layout(name, naming, prefix):
    published = oracle(name)
    (layout,) = detected(entries(published[naming], prefix))
    assert (layout.name, layout.pipeline) == LAYOUTS[name]
    assert layout.network.prefix == prefix
    own = {n.removeprefix(prefix): e for n, e in entries(published[naming], prefix).items()}
    got = layout.network.read(own)
    assert {key: list(e.shape) for key, e in got.items()} == published["diffusers"]


@pytest.mark.parametrize(
    ("columns", "guidance", "name"),
    [(64, True, "FLUX.1 dev"), (64, False, "FLUX.1 schnell"), (384, True, "FLUX.1 Fill")],
)
def test_kinds_of_flux(columns, guidance, name):
    shapes = dict(oracle("flux_dev")["original"])
    if not guidance:
        shapes = {n: s for n, s in shapes.items() if "guidance_in" not in n}
    shapes["img_in.weight"] = [3072, columns]
    (layout,) = detected(entries(shapes))
    assert layout.name == name
    dynamic = layout.scheduler["use_dynamic_shifting"]
    assert (dynamic, layout.scheduler["shift"]) == ((True, 3.0) if guidance else (False, 1.0))


def test_other_channels_of_flux_are_refused_by_name():
    shapes = {**oracle("flux_dev")["original"], "img_in.weight": [3072, 196]}
    with pytest.raises(InputError, match=r"got Flex\.2, which is not supported"):
        layout_flux.detect(entries(shapes))


def test_other_kinds_of_sd3_are_refused_by_name():
    shapes = {**oracle("sd35_large")["original"], "context_processor.layers.0.x": [1]}
    with pytest.raises(InputError, match="with a context_processor"):
        layout_sd3.detect(entries(shapes))


def test_names_of_a_lora_of_flux_are_no_model():
    names = [f"double_blocks.0.img_attn.qkv.lora_{x}.weight" for x in "AB"]
    names += ["img_in.lora_A.weight", "double_blocks.0.img_attn.norm.key_norm.scale"]
    assert detected(entries(dict.fromkeys(names, (2, 2)))) == []


@pytest.mark.parametrize(("number", "side"), [(256, 32), (1024, 64)])
def test_sizes_of_dit(number, side):
    shapes = {**oracle("dit_xl_2_256")["original"], "pos_embed": [1, number, 1152]}
    (layout,) = detected(entries(shapes))
    code = {"freq_shift": 0, "norm_eps": 1e-6}
    assert layout.fields["transformer"] == {"sample_size": side, **code}
    sit = layout_dit.detect(entries(shapes), "flow_prediction")
    assert sit is not None
    assert sit.name == "SiT"
    assert sit.fields["transformer"] == {"sample_size": side, **code, "reverses_time": True}


@pytest.mark.parametrize(
    ("columns", "width", "expected"),
    [
        (None, 768, layout_stable_diffusion.SD1),
        (None, 1024, layout_stable_diffusion.SD2),
        (2816, 2048, layout_stable_diffusion.SDXL),
        (2560, 1280, layout_stable_diffusion.REFINER),
    ],
)
def test_unets_alone(columns, width, expected):
    shapes = {"input_blocks.0.0.weight": (320, 4, 3, 3)}
    shapes["input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"] = (640, width)
    if columns is not None:
        shapes["label_emb.0.0.weight"] = (1280, columns)
    assert detected(entries(shapes, UNET)) == [expected]


def test_vaes_below_either_prefix():
    shapes = oracle("flux_dev")["original"]
    for prefix in ("first_stage_model.", "vae."):
        vae = {f"{prefix}decoder.conv_in.weight": (512, 16, 3, 3)}
        (layout,) = detected(entries(shapes, UNET) | entries(vae))
        assert layout.components[1].prefix == prefix


T5 = {
    "shared.weight": (32128, 4096),
    "encoder.final_layer_norm.weight": (4096,),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
}
for _i in range(24):
    _layers = f"encoder.block.{_i}.layer"
    T5 |= {f"{_layers}.0.SelfAttention.{x}.weight": (4096, 4096) for x in "qkvo"}
    T5 |= {f"{_layers}.1.DenseReluDense.wi_{i}.weight": (10240, 4096) for i in (0, 1)}
    T5 |= {f"{_layers}.1.DenseReluDense.wo.weight": (4096, 10240)}
    T5 |= {f"{_layers}.{i}.layer_norm.weight": (4096,) for i in (0, 1)}


def test_t5():
    assert len(T5) == 219
    part = layout_parts.t5("_2")
    assert part.config(part.read(entries(T5))) == {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "relative_attention_num_buckets": 32,
        "feed_forward_proj": "gated-gelu",
    }
    tied = entry("encoder.embed_tokens.weight", (32128, 4096))
    both = entries(T5) | {tied.name: tied}
    assert part.read(both) == entries(T5)
    del both["shared.weight"]
    assert part.read(both)["shared.weight"] is tied


def test_the_projection_of_clip_is_the_identity():
    """Whether a file has one or not: the pooled embedding of CLIP-L is not projected."""
    names = {
        "text_model.final_layer_norm.weight": (3,),
        "text_model.embeddings.position_ids": (1, 77),
    }
    found = layout_parts.clip_l(projects=True).read(entries(names))
    assert found.keys() == {"text_model.final_layer_norm.weight", "text_projection.weight"}
    np.testing.assert_array_equal(read_tensor(found["text_projection.weight"]), np.eye(3))
    stored = entries(names | {"text_projection.weight": (3, 3)})
    read = layout_parts.clip_l(projects=True).read(stored)
    np.testing.assert_array_equal(read_tensor(read["text_projection.weight"]), np.eye(3))
    assert "text_projection.weight" not in layout_parts.clip_l(projects=False).read(entries(names))


def bert_shapes():
    """The tensors of LDM's text encoder, in x-transformers."""
    shapes = {
        "token_emb.weight": (30522, 1280),
        "pos_emb.emb.weight": (77, 1280),
        "norm.weight": (1280,),
        "norm.bias": (1280,),
        "to_logits.weight": (30522, 1280),
        "to_logits.bias": (30522,),
    }
    for i in range(32):
        attention, mlp = (f"attn_layers.layers.{2 * i + j}" for j in (0, 1))
        shapes |= {
            f"{a}.0.{leaf}": (1280,) for a in (attention, mlp) for leaf in ("weight", "bias")
        }
        shapes |= {f"{attention}.1.to_{x}.weight": (512, 1280) for x in "qkv"}
        shapes |= {
            f"{attention}.1.to_out.weight": (1280, 512),
            f"{attention}.1.to_out.bias": (1280,),
        }
        shapes |= {f"{mlp}.1.net.0.0.weight": (5120, 1280), f"{mlp}.1.net.0.0.bias": (5120,)}
        shapes |= {f"{mlp}.1.net.2.weight": (1280, 5120), f"{mlp}.1.net.2.bias": (1280,)}
    return shapes


def test_bert_of_latent_diffusion():
    shapes = bert_shapes()
    got = layout_ldm.bert_from_original(entries(shapes))
    layer = "model.layers.31"
    assert got[f"{layer}.self_attn_layer_norm.bias"].name == "attn_layers.layers.62.0.bias"
    assert got[f"{layer}.self_attn.out_proj.weight"].name == "attn_layers.layers.62.1.to_out.weight"
    assert got[f"{layer}.final_layer_norm.weight"].name == "attn_layers.layers.63.0.weight"
    assert got[f"{layer}.fc2.weight"].name == "attn_layers.layers.63.1.net.2.weight"
    assert len(got) == 6 + 32 * 13
    assert infer_config.ldm_bert_fields(got) == {
        "vocab_size": 30522,
        "d_model": 1280,
        "max_position_embeddings": 77,
        "encoder_layers": 32,
        "encoder_ffn_dim": 5120,
        "encoder_attention_heads": 8,
        "head_dim": 64,
    }
    tensors = {
        key: LazyTensor(dtype=np.dtype(np.float16), shape=e.shape, fetch=lambda e=e: e.name)
        for key, e in got.items()
    }
    back = layout_ldm.bert_to_original(tensors)
    assert {name: tensor.fetch() for name, tensor in back.items()} == {
        name: name for name in shapes
    }


def test_latent_diffusion_is_no_stable_diffusion():
    unet = {f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3)}
    bert = {f"cond_stage_model.transformer.{n}": s for n, s in bert_shapes().items()}
    found = entries(unet | bert)
    assert next(m.detect(found) for m in MODULES if m.detect(found)) is layout_ldm.TEXT_TO_IMAGE
