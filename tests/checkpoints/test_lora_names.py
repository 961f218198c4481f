"""Names of LoRA tensors without a model to look them up in."""

import json
import pathlib

import pytest

from jaxdiff.checkpoints.lora_names import parse, unflatten_key

TABLES = pathlib.Path(__file__).parent / "lora"


@pytest.mark.parametrize("name", sorted(p.stem for p in TABLES.glob("*.json")))
def test_every_kohya_name_of_a_published_model_is_taken_apart(name):
    table = json.loads((TABLES / f"{name}.json").read_text())
    for module, (_, spellings) in table["modules"].items():
        for spelling in spellings:
            found = parse(f"{spelling}.lora_down.weight")
            assert found.flat
            assert unflatten_key(found.module) == module


@pytest.mark.parametrize("flat", ["foo", "down_blocks_0_foo", "conv_", "conv11", "", "attn1.to_q"])
def test_a_name_of_no_published_model_is_not_guessed_at(flat):
    assert unflatten_key(flat) is None


@pytest.mark.parametrize(
    ("name", "spelling", "component", "module", "role"),
    [
        ("unet.a.to_q.lora_A.weight", "PEFT", "unet", "a.to_q", "down"),
        ("unet.a.to_q.lora_B.default.weight", "PEFT", "unet", "a.to_q", "up"),
        (
            "text_encoder_2.text_model.x.lora_B.weight",
            "PEFT",
            "text_encoder_2",
            "text_model.x",
            "up",
        ),
        (
            "base_model.model.encoder.layers.0.lora_A.weight",
            "PEFT",
            "text_encoder",
            "encoder.layers.0",
            "down",
        ),
        ("base_model.model.a.to_q.lora_A.weight", "PEFT", "unet", "a.to_q", "down"),
        ("unet.a.to_q.lora.down.weight", "diffusers", "unet", "a.to_q", "down"),
        ("text_encoder.x.lora_linear_layer.up.weight", "diffusers", "text_encoder", "x", "up"),
        ("a.processor.to_out_lora.up.weight", "diffusers", "unet", "a.to_out.0", "up"),
        ("lora_te1_x.alpha", "kohya", "text_encoder", "x", "alpha"),
        ("lora_unet_x.lora_mid.weight", "kohya", "unet", "x", "mid"),
        ("lora_unet_x.hada_w1_a", "kohya", "unet", "x", "hada_w1_a"),
        ("lora_unet_x.a1.weight", "kohya", "unet", "x", "a1"),
        ("lora_unet_x.weight", "kohya", "unet", "x", "weight"),
        ("lora_te2_x.w_norm", "kohya", "text_encoder_2", "x", "diff"),
        ("lora_unet_x.b_norm", "kohya", "unet", "x", "diff_b"),
        ("oft_unet_x.oft_blocks", "kohya", "unet", "x", "oft_blocks"),
        ("lycoris_a_b.lokr_w1", "LyCORIS", "unet", "a_b", "lokr_w1"),
        ("lycoris_text_model_b.diff", "LyCORIS", "text_encoder", "text_model_b", "diff"),
        ("unet.a.to_q.hada_t1", "LyCORIS", "unet", "a.to_q", "hada_t1"),
        ("base_model.model.a.hada_t1", "PEFT", "unet", "a", "hada_t1"),
        ("unet.a.lora_B.bias", "PEFT", "unet", "a", "lora_bias"),
        ("unet.a.lora_magnitude_vector.default.weight", "PEFT", "unet", "a", "magnitude"),
        ("unet.a.lora_magnitude_vector", "PEFT", "unet", "a", "magnitude"),
        ("unet.a.oft_R.weight", "PEFT", "unet", "a", "oft_R"),
        (
            "diffusion_model.input_blocks.1.1.proj_in.lora_A.weight",
            "ComfyUI",
            "unet",
            "input_blocks_1_1_proj_in",
            "down",
        ),
        (
            "text_encoders.clip_g.transformer.text_model.x.dora_scale",
            "ComfyUI",
            "text_encoder_2",
            "text_model_x",
            "dora_scale",
        ),
    ],
)
def test_what_a_name_says(name, spelling, component, module, role):
    assert parse(name)[:4] == (spelling, component, module, role)


@pytest.mark.parametrize(
    "name", ["a.weight", "unet.a.weight", "lora_unet_x.hada_w1", "a.lora_A.bias", "alpha"]
)
def test_other_names_say_nothing(name):
    assert parse(name) is None
