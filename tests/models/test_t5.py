"""T5's rules that a comparison with one implementation cannot show on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec

from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.jsonfiles import write_object
from jaxdiff.core.configs import to_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.models.build import abstract, initialise, param_dict, with_params
from jaxdiff.models.presets import preset
from jaxdiff.models.t5.config import T5Config
from jaxdiff.models.t5.module import T5EncoderModel, relative_position_buckets
from jaxdiff.parallel.sharding import ANY, T5, spec

TINY = {
    "vocab_size": 20,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
IDS = jnp.array([[5, 6, 7, 1, 0, 0]])


def model(**fields):
    return initialise(T5EncoderModel, T5Config(**TINY | fields), seed=0)


def test_masked_padding_does_not_count():
    """The states of the text are those of the text without padding."""
    whole = model().features(IDS, masks_padding=True)
    alone = model().features(IDS[:, :4])
    np.testing.assert_allclose(whole.last[:, :4], alone.last, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole.mask, [[True] * 4 + [False] * 2])
    plain = model().features(IDS)
    assert jnp.abs(plain.last[:, :4] - alone.last).max() > 1e-3


def test_a_text_of_padding_alone_is_finite():
    assert jnp.isfinite(model().features(jnp.zeros((1, 3), int), masks_padding=True).last).all()


def test_buckets_are_those_of_the_paper():
    """Of 8: distances 0 and 1 by themselves, then up to 4 and beyond on a logarithmic scale."""
    row = relative_position_buckets(9, num_buckets=8, max_distance=8)[4]
    np.testing.assert_array_equal(row, [3, 2, 2, 1, 0, 5, 6, 6, 7])


def test_float16_is_finite_where_sums_are_not_in_its_range():
    config = T5Config(**TINY)
    scales = {path: 60_000 if ".wo." in path else 1 for path in param_dict(model())}
    state = {p: (w * scales[p]).astype(jnp.float16) for p, w in param_dict(model()).items()}
    half = with_params(abstract(T5EncoderModel, config, dtype=jnp.float16), state)
    wide = with_params(abstract(T5EncoderModel, config), state)
    got, expected = half(IDS), wide(IDS)
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("names", [("shared",), ("encoder.embed_tokens",), None])
def test_either_name_of_the_token_embedding_loads(tmp_path, names):
    tensors = {}
    for path, array in param_dict(model()).items():
        name, _, leaf = path.rpartition(".")
        values = np.ascontiguousarray(np.asarray(array).T if leaf == "kernel" else array)
        tensors[f"{name}.weight"] = values
    table = tensors.pop("shared.weight")
    for name in names or ("shared", "encoder.embed_tokens"):
        tensors[f"{name}.weight"] = table
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    config = to_mapping(T5Config(**TINY)) | {"architectures": ["T5EncoderModel"]}
    write_object(tmp_path / "config.json", config | {"model_type": "t5"})
    loaded = read_component(tmp_path).module
    assert isinstance(loaded, T5EncoderModel)
    np.testing.assert_allclose(loaded(IDS), model()(IDS), rtol=1e-5, atol=1e-6)


def test_every_matrix_is_sharded():
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    weights = param_dict(preset("text", "t5-xxl").abstract())
    column, row = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
    for path, leaf in weights.items():
        got = spec(path, leaf.shape, T5, sizes)
        assert got == spec(path, leaf.shape, ANY, sizes)
        name = path.split(".")[-2]
        if name in ("q", "k", "v", "wi_0", "wi_1"):
            assert got == column, path
        elif name in ("o", "wo"):
            assert got == row, path
        elif name == "shared":
            assert got == PartitionSpec(None, "fsdp")
        elif path.endswith("scale"):
            assert got == PartitionSpec()


def test_refusals():
    with pytest.raises(InputError, match="feed_forward_proj: got 'gated-silu'"):
        T5Config(feed_forward_proj="gated-silu")
    with pytest.raises(InputError, match="dense_act_fn: got 'relu', expected one of gelu_new"):
        T5Config(**TINY, dense_act_fn="relu")
    with pytest.raises(InputError, match="is_gated_act: got False, expected one of True"):
        T5Config(**TINY, is_gated_act=False)
    with pytest.raises(InputError, match="relative_attention_num_buckets: got 5"):
        T5Config(relative_attention_num_buckets=5)
    with pytest.raises(InputError, match="clip_skip: got 2"):
        model().features(IDS, 2)
    shapes = jax.eval_shape(lambda: model(num_layers=1)(IDS))
    assert shapes.shape == (1, 6, 8)
