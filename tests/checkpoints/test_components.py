"""Component folders: what is written is read back, and everything broken is named."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.checkpoints.components import Component, read_component, write_component
from jaxdiff.checkpoints.model_registry import MODEL_CLASSES, class_name_of
from jaxdiff.core.errors import InputError
from jaxdiff.models.build import param_dict

DTYPES = ("float32", "bfloat16", "float16")


def bits(module):
    return {path: np.asarray(array).tobytes() for path, array in param_dict(module).items()}


@pytest.fixture
def vae(components, tmp_path):
    write_component(tmp_path / "vae", components["AutoencoderKL"])
    return tmp_path / "vae"


@pytest.fixture
def text(components, tmp_path):
    write_component(tmp_path / "text", components["CLIPTextModel"])
    return tmp_path / "text"


def edit_weights(folder, change):
    """Rewrite the weights of `folder` with `change(tensors)`."""
    path = next(folder.glob("*.safetensors"))
    tensors = safetensors.numpy.load_file(path)
    result = change(tensors)
    safetensors.numpy.save_file(tensors if result is None else result, path)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_round_trip_is_bit_exact(components, tmp_path, name, dtype):
    write_component(tmp_path / "a", components[name], dtype=jnp.dtype(dtype))
    first = read_component(tmp_path / "a")
    write_component(tmp_path / "b", first)
    second = read_component(tmp_path / "b", dtype=jnp.dtype(dtype))
    assert class_name_of(first.module) == name
    assert bits(first.module) == bits(second.module)
    assert {array.dtype for array in param_dict(first.module).values()} == {jnp.dtype(dtype)}
    assert [p.read_bytes() for p in sorted((tmp_path / "a").iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "b").iterdir())
    ]


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_loading_converts_to_the_dtype_asked_for(components, tmp_path, name):
    write_component(tmp_path / "a", components[name])
    loaded = read_component(tmp_path / "a", dtype=jnp.bfloat16)
    expected = {
        path: np.asarray(array).astype(jnp.bfloat16).tobytes()
        for path, array in param_dict(components[name].module).items()
    }
    assert bits(loaded.module) == expected


def test_loaded_module_computes_as_the_original(components, vae):
    decode = nnx.jit(lambda module, z: module.decode(z))
    z = jnp.linspace(-1, 1, 16).reshape(1, 2, 2, 4)
    expected = decode(components["AutoencoderKL"].module, z)
    np.testing.assert_array_equal(decode(read_component(vae).module, z), expected)


def test_compute_dtype_is_the_most_common_one(components, tmp_path):
    write_component(tmp_path / "a", components["UNet2DConditionModel"], dtype=jnp.float16)

    def widen(tensors):
        tensors["conv_in.bias"] = tensors["conv_in.bias"].astype(np.float64)

    edit_weights(tmp_path / "a", widen)
    module = read_component(tmp_path / "a").module
    assert module.dtype == jnp.float16
    assert param_dict(module)["conv_in.bias"].dtype == jnp.float32


def test_weights_go_where_they_are_told(vae):
    mesh = jax.make_mesh((8,), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    loaded = param_dict(read_component(vae, sharding=everywhere).module)
    assert all(array.sharding == everywhere for array in loaded.values())
    split = NamedSharding(mesh, PartitionSpec(None, None, None, "data"))
    by_path = read_component(
        vae, sharding=lambda p, _: split if p == "encoder.conv_in.kernel" else everywhere
    )
    assert param_dict(by_path.module)["encoder.conv_in.kernel"].sharding == split
    assert bits(by_path.module) == {p: np.asarray(a).tobytes() for p, a in loaded.items()}


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_old_attention_names_of_the_vae(components, tmp_path, kind):
    write_component(tmp_path / "vae", components[kind])

    def rename(tensors):
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        pattern = re.compile(r"\.(to_q|to_k|to_v|to_out\.0)\.")
        return {pattern.sub(lambda m: f".{old[m[1]]}.", k): v for k, v in tensors.items()}

    edit_weights(tmp_path / "vae", rename)
    names = safetensors.numpy.load_file(next((tmp_path / "vae").glob("*.safetensors")))
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in names
    assert bits(read_component(tmp_path / "vae").module) == bits(components[kind].module)


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_text_names_with_and_without_prefix(components, tmp_path, kind):
    write_component(tmp_path / "a", components[kind])

    def strip(tensors):
        tensors = {k.removeprefix("text_model."): v for k, v in tensors.items()}
        return tensors | {"embeddings.position_ids": np.arange(5)[None]}

    edit_weights(tmp_path / "a", strip)
    assert bits(read_component(tmp_path / "a").module) == bits(components[kind].module)


def test_written_text_names_have_the_prefix(text):
    names = safetensors.numpy.load_file(text / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


def test_position_ids_of_multilingual_clip_are_ignored(components, tmp_path):
    name = "transformer.embeddings.position_ids"
    write_component(tmp_path / "a", components["MultilingualCLIP"])
    edit_weights(tmp_path / "a", lambda tensors: tensors | {name: np.arange(9)[None]})
    found = bits(read_component(tmp_path / "a").module)
    assert found == bits(components["MultilingualCLIP"].module)


def test_position_ids_are_ignored(components, text):
    edit_weights(
        text, lambda t: t.update({"text_model.embeddings.position_ids": np.zeros((1, 5), "f2")})
    )
    assert bits(read_component(text).module) == bits(components["CLIPTextModel"].module)


def test_one_warning_counts_what_is_left_over(text, vae):
    zeros = np.zeros((2, 2), "f4")
    of_text = ("text_projection.weight", "logit_scale", "vision_model.x.bias", "visual.proj")
    edit_weights(text, lambda t: t.update(dict.fromkeys(of_text, zeros)))
    edit_weights(vae, lambda t: t.update(dict.fromkeys(("loss.logvar", "model_ema.decay"), zeros)))
    for folder, counts in (
        (text, "2 of CLIP's image encoder, 1 of text projections"),
        (vae, "1 of averaged weights (EMA), 1 of losses"),
    ):
        with pytest.warns(UserWarning, match="not read") as said:
            read_component(folder)
        (message,) = map(str, (each.message for each in said))
        assert message.endswith(f".safetensors: got tensors that are not read: {counts}")
    edit_weights(vae, lambda t: t.update({"losses": zeros}))
    with pytest.raises(InputError, match=r"unknown tensors: got 1 \(losses\)"):
        read_component(vae)


def test_foreign_config_entries_survive(text, tmp_path):
    foreign = {"_name_or_path": "x", "id2label": {"0": "LABEL_0"}, "dropout": 0.0, "top_k": 50}
    edit_config(text, dtype="float32", **foreign)
    write_component(tmp_path / "again", read_component(text))
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == json.loads((text / "config.json").read_text())


def test_saved_config_says_what_changed(vae, tmp_path):
    edit_config(vae, _diffusers_version="0.6.0")
    component = read_component(vae)
    component.module.config = dataclasses.replace(component.module.config, scaling_factor=0.5)
    write_component(tmp_path / "new", component, dtype=jnp.float16)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["scaling_factor"] == 0.5
    assert config["_diffusers_version"] == "0.6.0"


def test_transformers_config_states_the_stored_dtype(text, tmp_path):
    write_component(tmp_path / "half", read_component(text), dtype=jnp.float16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"


BAD_CONFIGS = {
    "unknown field": ({"num_layers": 3}, "num_layers"),
    "structure": ({"is_decoder": True}, "is_decoder"),
    "type": ({"hidden_size": "768"}, "hidden_size: got '768', expected an integer"),
    "fraction": ({"num_hidden_layers": 1.5}, "num_hidden_layers: got 1.5"),
    "truth": ({"num_hidden_layers": True}, "num_hidden_layers: got True"),
    "value": ({"hidden_act": "relu7"}, "hidden_act"),
    "heads": ({"num_attention_heads": 3}, "num_attention_heads"),
    "class": ({"architectures": ["UMT5EncoderModel"]}, "class: got 'UMT5EncoderModel'"),
    "no class": ({"architectures": None}, "got no class"),
    "odd class": ({"architectures": [7]}, "got no class"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_is_named(text, case):
    changes, message = BAD_CONFIGS[case]
    edit_config(text, **changes)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_component(text)
    assert str(text / "config.json") in str(error.value)


def test_unbuildable_config_is_named(components, tmp_path):
    write_component(tmp_path / "unet", components["UNet2DConditionModel"])
    edit_config(tmp_path / "unet", norm_num_groups=5)
    with pytest.raises(InputError, match=r"unet/config\.json.*norm_num_groups"):
        read_component(tmp_path / "unet")


@pytest.mark.parametrize("text_of", ["", "{", "[]", '"x"', "<html>", "\ufeff{}"])
def test_config_that_is_no_object(text, text_of):
    (text / "config.json").write_text(text_of)
    with pytest.raises(InputError, match=r"text/config\.json"):
        read_component(text)


def test_missing_config(text):
    (text / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: got no such file"):
        read_component(text)


def test_clip_model_without_a_tower(components, tmp_path):
    write_component(tmp_path / "clip", components["CLIPModel"])
    edit_config(tmp_path / "clip", vision_config=None)
    with pytest.raises(InputError, match="vision_config: got None"):
        read_component(tmp_path / "clip")


def drop(tensors):
    for name in [n for n in tensors if "decoder" in n]:
        del tensors[name]


BAD_WEIGHTS = {
    "missing": (drop, r"missing tensors: got \d+ \(decoder\.conv_in\.bias, .*, \.\.\.\)"),
    "surplus": (lambda t: t.update(extra=np.zeros(2, "f4")), r"unknown tensors: got 1 \(extra\)"),
    "shape": (
        lambda t: t.update({"quant_conv.bias": np.zeros(7, "f4")}),
        r"quant_conv\.bias \(7,\), not \(8,\)",
    ),
    "layout": (
        lambda t: t.update({"encoder.conv_in.weight": np.zeros((3, 3, 3, 8), "f4")}),
        r"encoder\.conv_in\.weight \(3, 3, 3, 8\), not \(8, 3, 3, 3\)",
    ),
    "integers": (
        lambda t: t.update({"quant_conv.bias": np.zeros(8, "i4")}),
        r"quant_conv\.bias in I32, not F32, F16, BF16",
    ),
    "both names": (
        lambda t: t.update(
            {"decoder.mid_block.attentions.0.query.bias": np.zeros(8, "f4")},
        ),
        "expected one of them",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_named(vae, case):
    change, message = BAD_WEIGHTS[case]
    edit_weights(vae, change)
    with pytest.raises(InputError, match=message) as error:
        read_component(vae)
    assert str(vae / "diffusion_pytorch_model.safetensors") in str(error.value)


def test_exponents_in_eight_bits_are_refused(vae):
    path = vae / "diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    table["quant_conv.bias"] |= {"dtype": "F8_E8M0", "shape": [32]}
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(InputError, match=r"quant_conv\.bias in F8_E8M0, not F32, F16, BF16"):
        read_component(vae)


def test_component_of_an_unknown_module():
    with pytest.raises(InputError, match="module: got Linear"):
        class_name_of(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))


def test_replacing_a_component_drops_old_weights_and_keeps_the_rest(components, vae):
    (vae / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"old")
    (vae / "README.md").write_text("mine")
    write_component(vae, components["AutoencoderKL"])
    assert sorted(p.name for p in vae.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_failed_write_leaves_everything_as_it_was(components, vae):
    before = {p.name: p.read_bytes() for p in vae.iterdir()}
    with pytest.raises(InputError, match="module: got Linear"):
        write_component(vae, Component(module=nnx.Linear(1, 1, rngs=nnx.Rngs(0))))
    assert {p.name: p.read_bytes() for p in vae.iterdir()} == before
    assert [p.name for p in vae.parent.iterdir()] == ["vae"]


def test_other_peoples_folders_are_not_touched(components, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="home: got a folder with other files in it"):
        write_component(tmp_path / "home", components["AutoencoderKL"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file: got a file"):
        write_component(tmp_path / "file", components["AutoencoderKL"])
    with pytest.raises(InputError, match=r"file/x: got .*, expected a folder that can be written"):
        write_component(tmp_path / "file" / "x", components["AutoencoderKL"])


def test_full_disk_is_one_error(components, vae, monkeypatch):
    before = {p.name: p.read_bytes() for p in vae.iterdir()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxdiff.checkpoints.components.write_tensors", full)
    with pytest.raises(InputError, match="vae: got no space left on device, expected"):
        write_component(vae, components["AutoencoderKL"])
    assert {p.name: p.read_bytes() for p in vae.iterdir()} == before
