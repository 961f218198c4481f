"""Names of transformers in their original code and in diffusers, and what shapes tell of them."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from original_keys import converted, entries, entry, fraction, hidden_size, oracle, small_arrays

from jaxdiff.checkpoints import infer_config, layout_dit, layout_flux, layout_sd3
from jaxdiff.checkpoints.key_tables import KeyTable, rows, same, swapped
from jaxdiff.checkpoints.safetensors import LazyTensor, read_table, read_tensor, write_tensors
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.errors import InputError

NETWORKS = {
    "sd3_medium": (layout_sd3.TABLE, infer_config.sd3_fields),
    "sd35_medium": (layout_sd3.TABLE, infer_config.sd3_fields),
    "sd35_large": (layout_sd3.TABLE, infer_config.sd3_fields),
    "flux_dev": (layout_flux.FLUX_TABLE, infer_config.flux_fields),
    "chroma": (layout_flux.CHROMA_TABLE, infer_config.chroma_fields),
    "dit_xl_2_256": (layout_dit.TABLE, infer_config.dit_fields),
}
# Of the networks whose table has none; facts of the published repositories.
CONFIGS = {
    "sd3_medium": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "dual_attention_layers": [],
        "qk_norm": None,
    },
    "dit_xl_2_256": {
        "num_layers": 28,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "attention_bias": True,
        "num_attention_heads": 16,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    },
}
# What no shape shows, or a default of the class.
UNSEEN = ("sample_size", "axes_dims_rope")


def lazy(values):
    return LazyTensor(dtype=values.dtype, shape=values.shape, fetch=lambda: values)


def write(path, arrays):
    write_tensors(path, {name: lazy(values) for name, values in arrays.items()})
    return path


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_places_of_the_published_networks(name):
    table, _ = NETWORKS[name]
    published = oracle(name)
    got = table.from_original(entries(published["original"]))
    assert {k: list(e.shape) for k, e in got.items()} == published["diffusers"]
    for key, (original, *how) in published["map"].items():
        found = got[key]
        assert found.name == original
        assert found.swapped == (how == ["swap"])
        if how and how != ["swap"]:
            shape = published["original"][original]
            begin, end = fraction(how[0], hidden_size(published), shape[0])
            row = 2 * int(np.prod(shape[1:]))
            assert (found.start, found.nbytes) == (begin * row, (end - begin) * row)
        else:
            assert found.start == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back(tmp_path, name):
    table, _ = NETWORKS[name]
    published = oracle(name)
    arrays = small_arrays(published)
    stored = read_table(write(tmp_path / "x.safetensors", arrays))
    expected = converted(published, arrays)
    got = {key: read_tensor(e) for key, e in table.from_original(stored).items()}
    assert got.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(got[key], values, err_msg=key)
    back = table.to_original({key: lazy(values) for key, values in got.items()})
    if name.startswith("dit"):
        del arrays["pos_embed"]  # which is computed
    assert back.keys() == arrays.keys()
    for key, values in arrays.items():
        assert back[key].shape == values.shape
        np.testing.assert_array_equal(back[key].fetch(), values, err_msg=key)


@pytest.mark.parametrize("name", NETWORKS)
def test_configs_are_told_by_the_shapes(name):
    table, fields = NETWORKS[name]
    published = oracle(name)
    got = fields(table.from_original(entries(published["original"])))
    wanted = published["config"] or CONFIGS[name]
    assert got.keys() >= wanted.keys() - set(UNSEEN)
    for key, value in wanted.items():
        if key not in UNSEEN:
            assert (list(got[key]) if isinstance(got[key], tuple) else got[key]) == value, key


def test_without_guidance_it_is_schnell():
    shapes = {n: s for n, s in oracle("flux_dev")["original"].items() if "guidance_in" not in n}
    got = layout_flux.FLUX_TABLE.from_original(entries(shapes))
    assert infer_config.flux_fields(got)["guidance_embeds"] is False


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_scales_of_8_bit_floats_count_for_every_part(tmp_path, spelling):
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(28, 4)).astype(ml_dtypes.float8_e4m3fn)
    shift = rng.normal(size=(8, 4)).astype(ml_dtypes.float8_e5m2)
    stored = {
        "single_blocks.0.linear1.weight": weight,
        f"single_blocks.0.linear1.{spelling}": np.float32(0.37),
        "single_blocks.0.linear1.bias": rng.normal(size=28).astype(np.float32),
        "final_layer.adaLN_modulation.1.weight": shift,
        f"final_layer.adaLN_modulation.1.{spelling}": np.float32(3.0),
        "scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn),
    }
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({k: np.asarray(v) for k, v in stored.items()}, path)
    found = layout_flux.FLUX_TABLE.from_original(read_weights(path))
    got = {name: read_tensor(e) for name, e in found.items()}
    whole = weight.astype(np.float32) * np.float32(0.37)
    block = "single_transformer_blocks.0"
    parts = [f"{block}.attn.to_{x}.weight" for x in "qkv"] + [f"{block}.proj_mlp.weight"]
    for part, rows_ in zip(parts, np.split(whole, [4, 8, 12]), strict=True):
        np.testing.assert_array_equal(got[part], rows_)
    halves = np.split(shift.astype(np.float32) * np.float32(3.0), 2)
    np.testing.assert_array_equal(got["norm_out.linear.weight"], np.concatenate(halves[::-1]))


TABLE = KeyTable(
    (same("a.", "b.*.x."), rows("q.*.", "to_q.*.", "to_k.*."), swapped("s", "t")), "q.", "b."
)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q.0.weight": (3, 2)}, r"got q\.0\.weight \(3, 2\), expected 2 equal parts"),
        ({"q.0.weight": ()}, "expected 2 equal parts"),
        ({"s": (3,)}, "expected 2 equal parts"),
        ({"s": (2,), "t": (2,)}, "got t and s, expected one"),
    ],
)
def test_files_that_do_not_fit(shapes, message):
    with pytest.raises(InputError, match=message):
        TABLE.from_original(entries(shapes))


def test_a_tensor_stored_by_columns_is_not_cut():
    columns = dataclasses.replace(entry("q.0.weight", (4, 2)), axes=(1, 0))
    with pytest.raises(InputError, match="stored by columns"):
        TABLE.from_original({"q.0.weight": columns})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"to_q.0.weight": np.ones(2)}, r"q\.0\.weight: got no to_k"),
        ({"other.weight": np.ones(2)}, "other.weight: got it, expected a tensor"),
        ({"b.0.x.bias": np.ones(2), "b.1.x.bias": np.zeros(2)}, "different values in 2 blocks"),
    ],
)
def test_networks_that_do_not_fit(arrays, message):
    tensors = {name: lazy(values) for name, values in arrays.items()}
    with pytest.raises(InputError, match=message):
        [tensor.fetch() for tensor in TABLE.to_original(tensors).values()]


def test_positions_of_dit():
    got = layout_dit.positions(8, 3)
    assert got.shape == (1, 9, 8)
    row, column, i = 2, 1, 1
    token = got[0, 3 * row + column]
    angle = 10000.0 ** (-4 * i / 8)
    np.testing.assert_allclose(token[i], np.sin(column * angle), rtol=1e-6)
    np.testing.assert_allclose(token[2 + i], np.cos(column * angle), rtol=1e-6)
    np.testing.assert_allclose(token[4 + i], np.sin(row * angle), rtol=1e-6)
    np.testing.assert_allclose(token[6 + i], np.cos(row * angle), rtol=1e-6)
