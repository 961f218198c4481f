"""`jaxdiff inspect` of LoRA and textual inversion files."""

import json
import pathlib
import pickle
import subprocess
import zipfile

import numpy as np
import originals
import pytest

from jaxdiff.cli import main

TABLES = pathlib.Path(__file__).parent / "lora"
TABLE_OF = {  # a network in `lora`, and its family
    "unet_sd15": "Stable Diffusion 1",
    "unet_sdxl_base": "Stable Diffusion XL",
}


def zeros(*shape):
    return np.zeros(shape, np.float16)


def inspect(capsys, path):
    """The JSON object of the command, and its text."""
    assert main.run("inspect", [str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main.run("inspect", [str(path)]) == 0
    return found, capsys.readouterr().out


def published(name, rank=2):
    """A kohya LoRA for every module of a published network."""
    table = json.loads((TABLES / f"{name}.json").read_text())
    tensors = {}
    for shape, (stem, *_) in table["modules"].values():
        tensors[f"{stem}.lora_down.weight"] = zeros(rank, *shape[1:])
        tensors[f"{stem}.lora_up.weight"] = zeros(shape[0], rank, *(1,) * (len(shape) - 2))
        tensors[f"{stem}.alpha"] = zeros()
    return table["modules"], tensors


@pytest.mark.parametrize("name", TABLE_OF)
def test_a_lora_for_a_published_model(tmp_path, capsys, name):
    modules, tensors = published(name)
    text, more = published("clip_l_sd15", rank=4)
    path = originals.write_safetensors(tmp_path / "x.safetensors", tensors | more)
    found, said = inspect(capsys, path)
    assert (found["layout"], found["family"]) == ("LoRA", TABLE_OF[name])
    assert found["facts"] == {
        "spelling": "kohya",
        "formats": {"LoRA": len(text) + len(modules)},
        "ranks": [2, 4],
        "modules": {"text_encoder": len(text), "unet": len(modules)},
        "convolutions": True,
        "tokens": [],
        "unread": {},
    }
    sizes = {part["name"]: part["parameters"] for part in found["parts"]}
    assert sizes == {
        "text_encoder": sum(array.size for array in more.values()),
        "unet": sum(array.size for array in tensors.values()),
    }
    assert [part["dtypes"] for part in found["parts"]] == [["F16"], ["F16"]]
    assert f"{TABLE_OF[name]} (LoRA)" in said
    assert f"ranks 2 4, modules text_encoder {len(text)} unet {len(modules)}" in said
    assert "LoCon convolutions yes" in said


PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("unet.{}.to_k.lora_{}.weight", "PEFT"),
        ("base_model.model.{}.to_k.lora_{}.weight", "PEFT"),
        ("unet.{}.to_k.lora.{}.weight", "diffusers"),
        ("{}.processor.to_k_lora.{}.weight", "diffusers"),
    ],
)
@pytest.mark.parametrize(
    ("width", "family"),
    [
        (768, "Stable Diffusion 1"),
        (1024, "Stable Diffusion 2"),
        (2048, "Stable Diffusion XL"),
        (1280, "Stable Diffusion XL refiner"),
        (512, "unknown"),
    ],
)
def test_spellings_and_families(tmp_path, capsys, name, spelling, width, family):
    roles = ("A", "B") if spelling == "PEFT" else ("down", "up")
    down, up = (name.format(PATH, role) for role in roles)
    tensors = {down: zeros(3, width), up: zeros(5, 3)}
    path = originals.write_safetensors(tmp_path / "x.safetensors", tensors)
    found, said = inspect(capsys, path)
    assert (found["layout"], found["family"]) == ("LoRA", family)
    facts = found["facts"]
    assert (facts["spelling"], facts["ranks"], facts["modules"]) == (spelling, [3], {"unet": 1})
    assert not facts["convolutions"]
    assert "LoCon convolutions no" in said


def test_a_control_lora_is_named(tmp_path, capsys):
    """One of FLUX.1 Canny or Depth, which replaces norms: loading rejects it."""
    block = "double_blocks.0.img_attn."
    factors = {f"{block}qkv.lora_{r}.weight": zeros(*shape) for r, shape in FACTORS.items()}
    norms = {f"{block}norm.query_norm.scale": zeros(128)}
    path = originals.write_safetensors(tmp_path / "x.safetensors", factors | norms)
    found, said = inspect(capsys, path)
    assert (found["layout"], found["family"]) == ("control LoRA, not supported", "FLUX.1")
    assert f"{path}: FLUX.1 (control LoRA, not supported)" in said
    plain = originals.write_safetensors(tmp_path / "plain.safetensors", factors)
    assert inspect(capsys, plain)[0]["layout"] == "LoRA"


FACTORS = {"A": (2, 3072), "B": (9216, 2)}


def test_a_folder_with_a_lora(tmp_path, capsys):
    tensors = {f"unet.{PATH}.to_k.lora_A.weight": zeros(3, 768)}
    originals.write_safetensors(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    assert inspect(capsys, tmp_path)[0]["layout"] == "LoRA"


@pytest.mark.parametrize(
    ("names", "formats"),
    [
        (["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"], "LoHa"),
        (["hada_w1_a", "hada_w2_b"], "LoHa"),
        (["lokr_w1", "lokr_w2_a", "lokr_w2_b"], "LoKr"),
        (["a1.weight", "a2.weight", "b1.weight", "b2.weight"], "GLoRA"),
        (["weight", "on_input"], "(IA)^3"),
        (["ia3_l"], "(IA)^3"),
        (["oft_R.weight"], "OFT"),
        (["diff", "diff_b"], "full"),
        (["diff_b"], "full"),
        (["w_norm", "b_norm"], "full"),
        (["lora_down.weight", "lora_up.weight", "dora_scale"], "DoRA"),
        (["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"], "DoRA"),
        (["lokr_w1", "lokr_w2", "dora_scale"], "LoKr with DoRA"),
    ],
)
def test_formats(tmp_path, capsys, names, formats):
    tensors = {f"lora_unet_a.{name}": zeros(2, 2) for name in names} | {
        "lora_unet_a.alpha": zeros()
    }
    found, said = inspect(capsys, originals.write_safetensors(tmp_path / "x.safetensors", tensors))
    assert found["layout"] == "LoRA"
    assert found["facts"]["formats"] == {formats: 1}
    assert f"formats {formats} 1, " in said
    assert "ignored" not in said


@pytest.mark.parametrize(("shape", "name"), [((2, 2, 2), "OFT"), ((2, 2, 2, 2), "BOFT")])
def test_formats_that_the_shape_tells(tmp_path, capsys, shape, name):
    tensors = {"oft_unet_a.oft_blocks": zeros(*shape), "oft_unet_a.alpha": zeros()}
    found, _ = inspect(capsys, originals.write_safetensors(tmp_path / "x.safetensors", tensors))
    assert found["facts"]["formats"] == {name: 1}


@pytest.mark.parametrize(
    ("names", "unread"),
    [
        (["lora_unet_a.lora_down.weight", "lora_unet_a.lora_E", "x"], {"AdaLoRA": 1, "others": 1}),
        (["base_model.model.a.boft_R", "base_model.model.a.boft_s"], {"BOFT of PEFT": 2}),
        (["lllite_unet_a.down.0.weight"], {"ControlNet-LLLite": 1}),
    ],
)
def test_what_is_not_read_is_said(tmp_path, capsys, names, unread):
    tensors = {name: zeros(2, 2) for name in names} | {"lora_unet_a.alpha": zeros()}
    found, said = inspect(capsys, originals.write_safetensors(tmp_path / "x.safetensors", tensors))
    assert found["facts"]["unread"] == unread
    assert "ignored keys " + " ".join(f"{kind} {count}" for kind, count in unread.items()) in said
    assert found["parts"][-1]["name"] == "unread"
    assert sum(part["tensors"] for part in found["parts"]) == len(tensors)


def test_words_that_come_with_a_lora(tmp_path, capsys):
    tensors = {f"bundle_emb.{word}.emb_params": zeros(2, 2) for word in ("sks", "cat")}
    tensors["lora_unet_a.lora_down.weight"] = zeros(2, 2)
    found, said = inspect(capsys, originals.write_safetensors(tmp_path / "x.safetensors", tensors))
    assert found["facts"]["tokens"] == ["cat", "sks"]
    assert "tokens cat sks" in said
    assert found["parts"][-1]["name"] == "embeddings"


@pytest.mark.parametrize(
    ("tensors", "family", "facts"),
    [
        ({"<cat>": zeros(768)}, "Stable Diffusion 1", ("<cat>", 1, {"text_encoder": 768})),
        ({"emb_params": zeros(3, 1024)}, "Stable Diffusion 2", ("x", 3, {"text_encoder": 1024})),
        (
            {"clip_l": zeros(2, 768), "clip_g": zeros(2, 1280)},
            "Stable Diffusion XL",
            ("x", 2, {"text_encoder": 768, "text_encoder_2": 1280}),
        ),
        (
            {"<cat>": zeros(1, 1280)},
            "Stable Diffusion XL refiner",
            ("<cat>", 1, {"text_encoder_2": 1280}),
        ),
        (
            {"clip_l": zeros(2, 768), "t5": zeros(2, 4096)},
            "FLUX.1",
            ("x", 2, {"text_encoder": 768, "text_encoder_2": 4096}),
        ),
        (
            {"clip_l": zeros(2, 768), "clip_g": zeros(2, 1280), "t5xxl": zeros(2, 4096)},
            "Stable Diffusion 3",
            ("x", 2, {"text_encoder": 768, "text_encoder_2": 1280, "text_encoder_3": 4096}),
        ),
        ({"<cat>": zeros(2, 8)}, "unknown", ("<cat>", 2, {"text_encoder": 8})),
    ],
)
def test_words(tmp_path, capsys, tensors, family, facts):
    found, said = inspect(capsys, originals.write_safetensors(tmp_path / "x.safetensors", tensors))
    assert (found["layout"], found["family"]) == ("textual inversion", family)
    assert tuple(found["facts"].values()) == facts
    word, count, widths = facts
    spelled = ", ".join(f"{name} {width}" for name, width in widths.items())
    assert f"token {word!r}, vectors {count}, widths {spelled}" in said
    assert sum(p["parameters"] for p in found["parts"]) == sum(t.size for t in tensors.values())


@pytest.mark.parametrize("tensors", [{"a": zeros(2, 2, 1)}, {"a": zeros(2), "b": zeros(2)}])
def test_other_tensors_are_neither(tmp_path, capsys, tensors):
    found, _ = inspect(capsys, originals.write_safetensors(tmp_path / "x.safetensors", tensors))
    assert (found["layout"], found["facts"]) == ("tensors", None)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("ending", [".pt", ".bin"])
def test_a_pickled_word_runs_nothing(tmp_path, capsys, ending):
    trace = tmp_path / "trace"
    root = {"string_to_param": {"*": Call(subprocess.call, ["touch", str(trace)])}}
    path = tmp_path / f"word{ending}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(root, 3))
    assert main.run("inspect", [str(path)]) == 2
    assert "a call of subprocess.call in data.pkl, expected only tensors" in capsys.readouterr().err
    assert not trace.exists()
    pickle.loads(pickle.dumps(root, 3))  # what would have happened
    assert trace.exists()
