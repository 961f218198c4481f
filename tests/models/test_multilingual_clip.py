"""MultilingualCLIP's rules that a comparison with one implementation cannot show on its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import initialise, param_dict
from jaxdiff.models.multilingual_clip.config import MultilingualCLIPConfig
from jaxdiff.models.multilingual_clip.module import MultilingualCLIP
from jaxdiff.models.presets import preset
from jaxdiff.models.text_encoder import TextModel
from jaxdiff.parallel.sharding import ANY, BERT, spec

TINY = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "transformerDimensions": 8,
    "numDims": 6,
}
IDS = jnp.array([[0, 6, 7, 2, 1, 1]])  # two of padding


def model(**options):
    return initialise(MultilingualCLIP, MultilingualCLIPConfig(**TINY), seed=0, **options)


def test_padding_does_not_count():
    """States and pooled embedding of a text are those of the text without padding."""
    encoder = model()
    assert isinstance(encoder, TextModel)
    padded, alone = encoder.features(IDS), encoder.features(IDS[:, :4])
    np.testing.assert_allclose(padded.last[:, :4], alone.last, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(padded.pooled, alone.pooled, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(padded.mask, [[True] * 4 + [False] * 2])
    other = encoder.features(IDS.at[0, 4].set(9))
    assert jnp.abs(padded.pooled - other.pooled).max() > 1e-3


def test_the_pooled_embedding_is_that_of_the_mean_state():
    encoder = model()
    features = encoder.features(IDS)
    kernel = encoder.LinearTransformation.kernel[...]
    expected = np.asarray(features.last[:, :4]).mean(1) @ np.asarray(kernel)
    np.testing.assert_allclose(features.pooled, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_float32():
    narrow, wide = model(dtype=jnp.bfloat16).features(IDS), model().features(IDS)
    for got, expected in zip(narrow[::2], wide[::2], strict=True):  # last states, pooled embedding
        assert got.dtype == jnp.bfloat16
        error = np.abs(np.asarray(got, np.float32) - expected)
        assert 0 < error.max() < 0.1 * np.abs(expected).max()


def test_weights_that_do_not_count():
    encoder = model()
    encoder.transformer.pooler.dense.kernel[...] = jnp.full((8, 8), jnp.nan)
    assert all(jnp.isfinite(x).all() for x in encoder.features(IDS)[::2])
    assert encoder.unused_parameters("last", pooled=True) == ("transformer.pooler.",)
    encoder.LinearTransformation.kernel[...] = jnp.full((8, 6), jnp.nan)
    assert jnp.isfinite(encoder(IDS)).all()
    assert "LinearTransformation." in encoder.unused_parameters("last", pooled=False)


def test_every_matrix_is_sharded():
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    column, row = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
    for path, leaf in param_dict(preset("text", "kandinsky21-mclip").abstract()).items():
        got = spec(path, leaf.shape, BERT, sizes)
        assert got == spec(path, leaf.shape, ANY, sizes), path
        if path.endswith((".query.kernel", ".value.kernel", ".intermediate.dense.kernel")):
            assert got == column, path
        elif path.endswith(".output.dense.kernel"):
            assert got == row, path
        elif path.endswith((".kernel", ".embedding")):
            assert "fsdp" in got, path
        else:
            assert got == PartitionSpec(), path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: got 'relative_key'",
        ),
        ({"transformerDimensions": 7}, "transformerDimensions: got 7, expected hidden_size, 8"),
        ({"num_attention_heads": 3}, "num_attention_heads: got 3, expected a divisor"),
        ({"max_position_embeddings": 2}, "max_position_embeddings - pad_token_id - 1: got 0"),
        ({"hidden_act": "selu"}, "hidden_act: got 'selu'"),
        ({"pad_token_id": 20}, "pad_token_id: got 20"),
        ({"numDims": 0}, "numDims: got 0"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(InputError, match=message):
        MultilingualCLIPConfig(**TINY | fields)


def test_too_many_layers_to_skip():
    with pytest.raises(InputError, match="clip_skip: got 2"):
        model().features(IDS, 2)
