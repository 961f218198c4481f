"""LoRAs through `jaxdiff convert`: the same changes of the same weights, in PEFT's spelling."""

import json
import pathlib
import re

import ml_dtypes
import numpy as np
import originals
import pytest

from jaxdiff.checkpoints.key_mapping import to_jax, torch_key_to_path
from jaxdiff.checkpoints.lora import METADATA, read_lora
from jaxdiff.checkpoints.lora_names import PEFT, parse
from jaxdiff.checkpoints.safetensors import LazyTensor, read_metadata, read_table, write_tensors
from jaxdiff.cli import main

TABLES = pathlib.Path(__file__).parent / "lora"
RNG = np.random.default_rng(0)
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYER = "text_model.encoder.layers.0.self_attn"
SHAPES = {
    "unet": {
        f"{BLOCK}.to_q.kernel": (4, 6),
        f"{BLOCK}.to_out.0.kernel": (4, 6),
        "conv_in.kernel": (3, 3, 4, 5),
    },
    "text_encoder": {f"{LAYER}.q_proj.kernel": (4, 6), f"{LAYER}.out_proj.kernel": (4, 6)},
}


def factor(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def pair(stem, down, up, rank=2, shape=(6, 4), **options):
    """Factors of a weight under these roles' names."""
    tail = (1,) * (len(shape) - 2)
    return {
        f"{stem}{down}.weight": factor(rank, *shape[1:], **options),
        f"{stem}{up}.weight": factor(shape[0], rank, *tail, **options),
    }


def convert(source, target, *more):
    return main.run("convert", [str(source), str(target), *more])


def same(source, target, shapes):
    """Fail unless both files change the same weights by the same factors; returns these."""
    before, after = read_lora(source, shapes), read_lora(target, shapes)
    assert {part: set(found) for part, found in before.items()} == {
        part: set(found) for part, found in after.items()
    }
    for part, found in before.items():
        for key, factors in found.items():
            np.testing.assert_array_equal(factors.down, after[part][key].down)
            np.testing.assert_array_equal(factors.up, after[part][key].up)
            assert np.float32(factors.scale) == np.float32(after[part][key].scale)
    for name in read_table(target):
        assert parse(name).spelling == PEFT
        assert name.startswith(("unet.", "text_encoder.text_model.", "text_encoder_2.text_"))
    return before


@pytest.mark.parametrize("style", [0, -1])
@pytest.mark.parametrize("name", sorted(p.stem for p in TABLES.glob("*.json")))
def test_every_weight_of_a_published_model(tmp_path, name, style):
    """Ranks and alphas differ from module to module, some have no alpha."""
    table = json.loads((TABLES / f"{name}.json").read_text())
    tensors, shapes = {}, {}
    for i, (key, (shape, names)) in enumerate(table["modules"].items()):
        stem, rank = names[style], 1 + i % 3
        tail = (1,) * (len(shape) - 2)
        tensors[f"{stem}.lora_down.weight"] = np.full((rank, *shape[1:]), i, np.float16)
        tensors[f"{stem}.lora_up.weight"] = np.full((shape[0], rank, *tail), -i, np.float16)
        if i % 5:
            tensors[f"{stem}.alpha"] = np.array(0.3 * (i % 4), np.float16)
        path = torch_key_to_path(f"{key}.weight", len(shape))
        shapes[path] = to_jax(np.broadcast_to(np.int8(0), shape), path).shape
    source = originals.write_safetensors(tmp_path / "a.safetensors", tensors)
    assert convert(source, tmp_path / "b.safetensors") == 0
    changes = same(source, tmp_path / "b.safetensors", {table["component"]: shapes})
    scales = {factors.scale for factors in changes[table["component"]].values()}
    assert len(scales) > 5


SPELLINGS = {
    "diffusers": pair(f"unet.{BLOCK}.to_q", ".lora.down", ".lora.up")
    | pair(f"text_encoder.{LAYER}.q_proj", ".lora_linear_layer.down", ".lora_linear_layer.up"),
    "processors": pair(f"{BLOCK}.processor.to_out_lora", ".down", ".up")
    | pair(f"text_encoder.{LAYER}.to_out_lora", ".down", ".up"),
    "bare": pair(f"base_model.model.{BLOCK}.to_q", ".lora_A", ".lora_B"),
    "bare text": pair(
        "base_model.model.encoder.layers.0.self_attn.q_proj", ".lora_A.default", ".lora_B.default"
    ),
    "PEFT": pair("unet.conv_in", ".lora_A", ".lora_B", shape=(5, 4, 3, 3)),
    "kohya": pair("lora_unet_conv_in", ".lora_down", ".lora_up", shape=(5, 4, 3, 3))
    | pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj", ".lora_down", ".lora_up"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_spellings(tmp_path, spelling, dtype):
    tensors = {name: array.astype(dtype) for name, array in SPELLINGS[spelling].items()}
    source = originals.write_safetensors(tmp_path / "a.safetensors", tensors)
    assert convert(source, tmp_path / "b.safetensors") == 0
    changes = same(source, tmp_path / "b.safetensors", SHAPES)
    assert 2 * sum(map(len, changes.values())) == len(tensors)
    stored = read_table(tmp_path / "b.safetensors").values()
    assert {entry.dtype for entry in stored} == {
        entry.dtype for entry in read_table(source).values()
    }


def test_alphas_of_peft_come_along(tmp_path, capsys):
    """From the settings beside an adapter, and a second time from the file's own header."""
    tensors = pair(f"base_model.model.{BLOCK}.to_q", ".lora_A", ".lora_B")
    tensors |= pair(f"base_model.model.{BLOCK}.to_out.0", ".lora_A", ".lora_B", rank=3)
    originals.write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    settings = {"lora_alpha": 5, "use_rslora": True, "alpha_pattern": {"to_q": 3}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    once, twice = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    assert convert(tmp_path, once) == 0
    assert "LoRA of 2 modules" in capsys.readouterr().out
    assert convert(once, twice) == 0
    changes = same(tmp_path, twice, SHAPES)["unet"]
    assert changes[f"{BLOCK}.to_q.weight"].scale == pytest.approx(3 / 2**0.5)
    assert changes[f"{BLOCK}.to_out.0.weight"].scale == pytest.approx(5 / 3**0.5)
    assert once.read_bytes() == twice.read_bytes()


@pytest.mark.parametrize(
    ("pattern", "scale"),
    [
        ("^a.to_q", 3.0),
        ("to_q", 3.0),
        ("^to_q", 0.5),
        ("o_q", 0.5),
        ("a.to_q", 3.0),
        (r"^a\..*_[qk]", 3.0),
        (".*q", 3.0),
        ("a", 0.5),
        ("to_(k|v)", 0.5),
    ],
)
def test_patterns_of_alphas(tmp_path, pattern, scale):
    """PEFT matches regular expressions with the ends of paths at a dot; the first match counts."""
    tensors = pair("base_model.model.a.to_q", ".lora_A", ".lora_B")
    originals.write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    patterns = {"x": 7, pattern: 6} | ({"a.to_q": 8} if scale == 3 and pattern != "a.to_q" else {})
    settings = {"lora_alpha": 1, "alpha_pattern": patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    changes = read_lora(tmp_path, {"unet": {"a.to_q.kernel": (4, 6)}})
    assert changes["unet"]["a.to_q.weight"].scale == scale


def test_patterns_of_alphas_are_kept(tmp_path):
    """Each module's own alpha, for each regular expression and for a text encoder's bare paths."""
    layer = "encoder.layers.0.self_attn"
    tensors = pair(f"base_model.model.{layer}.q_proj", ".lora_A", ".lora_B")
    tensors |= pair(f"base_model.model.{layer}.out_proj", ".lora_A", ".lora_B", rank=4)
    originals.write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    patterns = {r"^encoder\.layers\.\d\.self_attn\.[qkv]_proj": 6}
    settings = {"lora_alpha": 1, "r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert convert(tmp_path, tmp_path / "b.safetensors") == 0
    for source in (tmp_path, tmp_path / "b.safetensors"):
        found = read_lora(source, SHAPES)["text_encoder"]
        scales = {key.split(".")[-2]: change.scale for key, change in found.items()}
        assert scales == {"q_proj": 3.0, "out_proj": 0.25}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_alpha": 1, "alpha_pattern": {"(": 2}},
            r"alpha_pattern: got '\(' .*expected a regular",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: got 'pissa_niter_4'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, capsys, settings, message):
    tensors = pair(f"base_model.model.{BLOCK}.to_q", ".lora_A", ".lora_B")
    originals.write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert convert(tmp_path, tmp_path / "b.safetensors") == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_the_trainer_said_stays(tmp_path):
    tensors = SPELLINGS["kohya"]

    def pending(array):
        return LazyTensor(dtype=array.dtype, shape=array.shape, fetch=lambda: array)

    said = {"ss_base_model": "x", "sshs_model_hash": "of other bytes"}
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_tensors(source, {k: pending(v) for k, v in tensors.items()}, metadata=said)
    assert convert(source, target) == 0
    found = read_metadata(target)
    settings = json.loads(found.pop(METADATA))
    assert found == {"format": "pt", "ss_base_model": "x"}
    assert settings == {
        "unet.r": 2,
        "unet.lora_alpha": 2,
        "unet.rank_pattern": {},
        "unet.alpha_pattern": {},
        "unet.target_modules": ["conv_in"],
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 2,
        "text_encoder.rank_pattern": {},
        "text_encoder.alpha_pattern": {},
        "text_encoder.target_modules": ["encoder.layers.0.self_attn.q_proj"],
    }


def test_in_another_dtype(tmp_path):
    source = originals.write_safetensors(tmp_path / "a.safetensors", SPELLINGS["kohya"])
    target = tmp_path / "b.safetensors"
    assert convert(source, target, "--dtype", "bfloat16") == 0
    assert {entry.dtype for entry in read_table(target).values()} == {"BF16"}
    got = read_lora(target, SHAPES)["unet"]["conv_in.weight"].down
    want = SPELLINGS["kohya"]["lora_unet_conv_in.lora_down.weight"]
    np.testing.assert_array_equal(got, want.astype(ml_dtypes.bfloat16).astype(np.float32))


KOHYA = SPELLINGS["kohya"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_unet_conv_in.hada_w1_a": factor(2, 2)}, "LoHa, which a LoRA file .*hada_w1_a"),
        ({"lora_unet_conv_in.dora_scale": factor(5)}, "DoRA, which a LoRA file .*dora_scale"),
        ({"lora_unet_conv_in.diff_b": factor(5)}, "full, which a LoRA file .*diff_b"),
        ({"lora_unet_conv_in.lora_E": factor(5)}, "lora_E: got AdaLoRA, expected"),
        ({"lora_unet_conv_in.lokr_w1": factor(2, 2)}, "LoKr, which a LoRA file .*lokr_w1"),
        ({"lora_unet_conv_in.a1.weight": factor(2, 2)}, "GLoRA, which a LoRA file .*a1"),
        ({"lora_unet_conv_in.on_input": factor(1)}, r"\(IA\)\^3, which a LoRA file .*on_input"),
        ({"base_model.model.x.ia3_l": factor(2, 1)}, r"\(IA\)\^3, which a LoRA file .*ia3_l"),
        ({"oft_unet_conv_in.oft_blocks": factor(1, 2, 2)}, "OFT, which a LoRA file .*oft_blocks"),
        ({"lora_unet_conv_in.oft_blocks": factor(1, 1, 2, 2)}, "BOFT, which a LoRA file"),
        ({"base_model.model.x.oft_R.weight": factor(2, 6)}, "OFT, which a LoRA file .*oft_R"),
        ({"lora_unet_conv_norm_out.w_norm": factor(5)}, "full, which a LoRA file .*w_norm"),
        ({"unet.conv_in.lora_B.bias": factor(5)}, "full, which a LoRA file .*lora_B.bias"),
        ({"x.lora_magnitude_vector": factor(5)}, "DoRA, which a LoRA file .*magnitude"),
        ({"bundle_emb.x.emb_params": factor(5)}, "textual inversions, which .*bundle_emb"),
        ({"lora_unet_a_b.lora_up.weight": factor(2, 2)}, "names of no LoRA .*lora_unet_a_b"),
        ({"lora_unet_input_blocks_77.lora_up.weight": factor(2, 2)}, "names of no LoRA"),
        ({"unet.conv_in.lora_A.weight": factor(2, 2)}, "names of no LoRA .*conv_in.lora_A"),
        ({"lora_unet_conv_in.lora_mid.weight": factor(2, 2, 3, 3)}, "Tucker factors: got 1"),
        ({"lora_unet_conv_out.lora_up.weight": factor(2, 2)}, "half of a pair: got 1"),
        ({"lora_unet_conv_in.lora_up.weight": factor(5, 3, 1, 1)}, "do not go together"),
        ({"lora_unet_conv_in.lora_up.weight": factor(5, 2)}, "do not go together"),
        ({"lora_unet_conv_in.alpha": factor(0)}, r"alpha: got \(0,\), expected one number"),
        ({"lora_unet_conv_in.alpha": np.array(np.nan, np.float32)}, "conv_in: got the scale nan"),
    ],
)
def test_what_cannot_be_is_a_sentence(tmp_path, capsys, more, message):
    source = originals.write_safetensors(tmp_path / "a.safetensors", KOHYA | more)
    assert convert(source, tmp_path / "b.safetensors") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not (tmp_path / "b.safetensors").exists()
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("target", "more", "message"),
    [
        ("b", (), "b for a LoRA, expected FILE.safetensors"),
        ("b.safetensors", ("--variant", "fp16"), "variant: got 'fp16' for a LoRA"),
        ("b.safetensors", ("--prediction-type", "epsilon"), "prediction_type: got 'epsilon'"),
        ("b.safetensors", ("--vae", "x"), "vae: got 'x' for a LoRA"),
    ],
)
def test_options_that_a_lora_has_not(tmp_path, capsys, target, more, message):
    source = originals.write_safetensors(tmp_path / "a.safetensors", KOHYA)
    assert convert(source, tmp_path / target, *more) == 2
    assert message in capsys.readouterr().err


def test_a_textual_inversion_is_no_lora(tmp_path, capsys):
    source = originals.write_safetensors(tmp_path / "a.safetensors", {"emb_params": factor(2, 8)})
    assert convert(source, tmp_path / "b.safetensors") == 2
    assert "got a textual inversion, expected a model or a LoRA" in capsys.readouterr().err
