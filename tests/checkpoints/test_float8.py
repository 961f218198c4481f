"""8-bit floats, plain and with scales in both spellings of ComfyUI."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import originals
import pytest
import safetensors.numpy

from jaxdiff.checkpoints.components import read_component, write_component
from jaxdiff.checkpoints.lora import read_lora
from jaxdiff.checkpoints.lora_writing import write_lora
from jaxdiff.checkpoints.safetensors import read_table, read_tensor
from jaxdiff.checkpoints.single_file import read_single_file
from jaxdiff.checkpoints.textual_inversion import read_inversion
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.models.build import param_dict

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
SCALE = np.float32(0.37)


def save(path, tensors, **metadata):
    safetensors.numpy.save_file(tensors, path, metadata or None)
    return path


def marks(form="float8_e4m3fn"):
    return np.frombuffer(json.dumps({"format": form}).encode(), np.uint8)


@pytest.mark.parametrize(
    ("dtype", "bits", "values"),
    [
        # sign, exponent and mantissa of the OCP standard for 8-bit floats
        (E4M3, [0x38, 0x7E, 0x01, 0xB0, 0x08], [1.0, 448.0, 2**-9, -0.5, 2**-6]),
        (E5M2, [0x3C, 0x7B, 0x01, 0xB8, 0x04], [1.0, 57344.0, 2**-16, -0.5, 2**-14]),
    ],
)
def test_values(tmp_path, dtype, bits, values):
    stored = np.array(bits, np.uint8).view(dtype)
    path = save(tmp_path / "x.safetensors", {"x.weight": stored})
    got = read_tensor(read_weights(path)["x.weight"])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array(values, np.float32))


def scaled(tensors, spelling):
    """Matrices as 8-bit floats with a scale each, and what they stand for."""
    stored, wanted = {}, {}
    for i, (name, values) in enumerate(tensors.items()):
        stored[name] = wanted[name] = np.asarray(values, np.float32)
        if values.ndim != 2 or not name.endswith(".weight"):
            continue
        layer, factor = name.removesuffix(".weight"), np.float32(SCALE * (i + 1))
        stored[name] = values.astype(E4M3)
        wanted[name] = stored[name].astype(np.float32) * factor
        if spelling == "old":
            stored[f"{layer}.scale_weight"] = np.asarray(factor)
            stored[f"{layer}.scale_input"] = np.asarray(SCALE)
        else:
            stored[f"{layer}.weight_scale"] = np.asarray([factor])
            stored[f"{layer}.input_scale"] = np.asarray(SCALE)
            stored[f"{layer}.comfy_quant"] = marks()
    return stored, wanted


@pytest.fixture(scope="module")
def sd1():
    return originals.original_tensors("sd1", originals.components("sd1"))


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scales_of_a_single_file(tmp_path, sd1, spelling, dtype):
    stored, wanted = scaled(sd1, spelling)
    if spelling == "old":
        stored["model.diffusion_model.scaled_fp8"] = np.zeros(2, E4M3)
    got = read_single_file(save(tmp_path / "x.safetensors", stored), dtype)
    expected = read_single_file(save(tmp_path / "y.safetensors", wanted), dtype)
    for name, component in expected.components.items():
        ours = param_dict(got.components[name].module)
        for key, values in param_dict(component.module).items():
            assert ours[key].dtype == dtype
            np.testing.assert_array_equal(ours[key], values, err_msg=key)


def test_formats_in_the_header(tmp_path):
    tensors = {"a.weight": np.ones((2, 2), E5M2), "a.weight_scale": np.asarray(SCALE)}
    for form in ("float8_e5m2", "nvfp4"):
        layers = json.dumps({"layers": {"a": {"format": form}}})
        path = save(tmp_path / "x.safetensors", tensors, _quantization_metadata=layers)
        if form == "nvfp4":
            with pytest.raises(
                InputError, match=r"metadata\): a: got the format 'nvfp4', expected"
            ):
                read_weights(path)
        else:
            assert (read_tensor(read_weights(path)["a.weight"]) == SCALE).all()


@pytest.mark.parametrize("others", [np.float16, np.float32, None])
def test_what_keeps_its_dtype_gets_that_of_the_others(components, tmp_path, others):
    """bfloat16 where all are 8-bit floats: it holds them exactly."""
    folder = tmp_path / "vae"
    write_component(folder, components["AutoencoderKL"])
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = {
        name: values.astype(E4M3 if others is None or values.ndim == 4 else others)
        for name, values in safetensors.numpy.load_file(path).items()
    }
    save(path, tensors)
    wanted = np.dtype(ml_dtypes.bfloat16 if others is None else others)
    write_component(tmp_path / "again", read_component(folder))
    again = safetensors.numpy.load_file(tmp_path / "again" / path.name)
    for name, values in tensors.items():
        assert again[name].dtype == wanted
        np.testing.assert_array_equal(again[name], values.astype(np.float32).astype(wanted))


def test_an_index_of_shards_with_scales(tmp_path):
    one = {"a.weight": np.ones((2, 2), E4M3)}
    save(tmp_path / "m-1.safetensors", one)
    save(tmp_path / "m-2.safetensors", {"a.scale_weight": np.asarray(SCALE)})
    places = {"a.weight": "m-1.safetensors", "a.scale_weight": "m-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert (read_tensor(read_weights(index)["a.weight"]) == SCALE).all()


def test_lora_and_textual_inversion(tmp_path):
    rng = np.random.default_rng(0)
    down, up = (rng.normal(size=shape).astype(E4M3) for shape in ((2, 8), (6, 2)))
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    tensors |= {f"{stem}.alpha": np.asarray(1.0, E4M3)}
    tensors |= {f"{stem}.lora_up.scale_weight": np.asarray(SCALE)}
    path = save(tmp_path / "lora.safetensors", tensors)
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    changes = read_lora(path, {"unet": {f"{module}.kernel": (8, 6)}})
    (change,) = changes["unet"].values()
    wanted = 0.5 * (up.astype(np.float32) * SCALE) @ down.astype(np.float32)
    np.testing.assert_allclose(change.delta(np.zeros((6, 8))), wanted, rtol=1e-6)
    assert write_lora(tmp_path / "again.safetensors", path) == 1
    again = read_table(tmp_path / "again.safetensors")
    assert {entry.dtype for entry in again.values()} == {"BF16"}
    np.testing.assert_array_equal(
        read_tensor(again[f"unet.{module}.lora_A.weight"]), down.astype(ml_dtypes.bfloat16)
    )
    path = save(tmp_path / "word.safetensors", {"emb_params": down})
    got = read_inversion(path, {"text_encoder": 8})
    np.testing.assert_array_equal(got.vectors["text_encoder"], down.astype(np.float32))


def test_inspect_shows_them(tmp_path, sd1, capsys):
    stored, _ = scaled(sd1, "new")
    stored = {k: v.astype(E5M2) if v.ndim == 4 else v for k, v in stored.items()}
    path = save(tmp_path / "x.safetensors", stored)
    assert main.run("inspect", [str(path), "--json"]) == 0
    parts = {part["name"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
    assert set(parts["unet"]["dtypes"]) == {"F32", "F8_E5M2", "F8_E4M3 (scaled)"}
    unet = [v for k, v in sd1.items() if k.startswith("model.diffusion_model.")]
    assert parts["unet"]["parameters"] == sum(v.size for v in unet)
    assert main.run("inspect", [str(path)]) == 0
    assert "F8_E4M3 (scaled)" in capsys.readouterr().out


EIGHT = np.ones((2, 2), E4M3)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight_scale": np.ones(())}, r"a\.weight_scale: got no weight of this layer"),
        (
            {"a.weight": EIGHT, "a.weight_scale": np.ones(()), "a.scale_weight": np.ones(())},
            "got two scales of this layer",
        ),
        ({"a.weight": EIGHT, "a.weight_scale": np.ones(2)}, r"got F64 \(2,\), expected one number"),
        ({"a.weight": EIGHT, "a.weight_scale": np.ones((), "i8")}, r"got I64 \(\), expected one"),
        ({"a.weight": np.ones(2, "i1"), "a.weight_scale": np.ones(())}, "got I8 with a scale"),
        ({"a.weight": EIGHT, "a.comfy_quant": marks("mxfp8")}, "a.comfy_quant: got the format 'mx"),
        ({"a.weight": EIGHT, "a.comfy_quant": np.ones(3, "u1")}, "a.comfy_quant: got invalid JSON"),
        ({"a.weight": EIGHT, "a.weight_scale_2": np.ones(())}, "got nvfp4, expected float8_e4m3fn"),
        ({"a.weight": np.ones(2, "u1"), "a.absmax": np.ones(())}, "a.absmax: got bitsandbytes"),
        ({"a.qweight": np.ones(2, "i4")}, "a.qweight: got SVDQuant or GPTQ"),
        ({"a.weight": EIGHT, "a.weight_scale_inv": np.ones((1, 1))}, "got block scales"),
    ],
)
def test_scales_that_nobody_knows(tmp_path, tensors, message):
    path = save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(InputError, match=message) as error:
        read_weights(path)
    assert "x.safetensors: " in str(error.value)
