"""DiT: what it is before training, and the parts that it shares with other transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import initialise, param_dict, with_params
from jaxdiff.models.dit.adapter import DiTAdapter
from jaxdiff.models.dit.config import DiTTransformer2DConfig
from jaxdiff.models.dit.module import DiTTransformer2DModel
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.patches import PatchEmbed, sincos_positions, unpatchify

CONFIG = DiTTransformer2DConfig(
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    sample_size=8,
    out_channels=8,
    num_embeds_ada_norm=3,
)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    return initialise(DiTTransformer2DModel, CONFIG, seed=0)


def test_blocks_are_the_identity_before_training(model):
    tokens = jax.random.normal(KEY, (2, 16, 16))
    t, labels = jnp.array([10.0, 900.0]), jnp.array([0, 3])
    for block in model.transformer_blocks:
        np.testing.assert_array_equal(block(tokens, t, labels), tokens)
        assert np.abs(block.condition(t, labels)).max() > 0.01


def test_the_output_is_zero_before_training(model):
    sample = jax.random.normal(KEY, (2, 8, 8, 4))
    out = model(sample, jnp.array([10.0, 900.0]), jnp.array([0, 3]))
    np.testing.assert_array_equal(out, np.zeros((2, 8, 8, 8)))


def test_the_adapter_gives_the_mean_of_a_learned_variance(model):
    values = {path: jnp.ones_like(x) / 16 for path, x in param_dict(model).items()}
    x, t, labels = jax.random.normal(KEY, (1, 8, 8, 4)), jnp.array([10.0]), jnp.array([1])
    whole = with_params(model, values)(x, t, labels)
    adapter = DiTAdapter(model, "epsilon")
    np.testing.assert_array_equal(adapter(values, x, t, {"class_labels": labels}), whole[..., :4])
    assert adapter == DiTAdapter(initialise(DiTTransformer2DModel, CONFIG, seed=1), "epsilon")
    with pytest.raises(InputError, match="perturbed attention for a DiT, expected another rule"):
        adapter(values, x, t, {"class_labels": labels}, perturbed=jnp.array([True]))


def test_positions_are_sines_and_cosines_of_column_and_row():
    table = sincos_positions((2, 3), 8, base=6).reshape(2, 3, 8)
    for row in range(2):
        for column in range(3):
            want = []
            for place in (column * 2, row * 3):  # on a grid of six
                angles = place * np.array([1, 0.01])
                want += [*np.sin(angles), *np.cos(angles)]
            np.testing.assert_allclose(table[row, column], want, atol=1e-6)


def test_stored_positions_are_cropped_from_the_centre():
    layers = LayerFactory(rngs=None)
    shapes = PatchEmbed(1, 8, 2, layers=layers, base=4, max_size=6)
    table = np.arange(6 * 6 * 8, dtype=np.float32).reshape(1, 36, 8)
    params = {"proj.kernel": np.zeros((2, 2, 1, 8), np.float32), "proj.bias": np.zeros(8)}
    params = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}

    def call(table):
        return with_params(shapes, {**params, "pos_embed": table})(jnp.zeros((1, 4, 8, 1)))

    got = call(jnp.asarray(table))
    np.testing.assert_array_equal(got[0], table.reshape(6, 6, 8)[2:4, 1:5].reshape(-1, 8))
    slope = jax.grad(lambda table: call(table).sum())(jnp.asarray(table))
    np.testing.assert_array_equal(slope, np.zeros_like(table))
    with pytest.raises(InputError, match="columns of patches: got 7, expected at most 6"):
        with_params(shapes, {**params, "pos_embed": jnp.asarray(table)})(jnp.zeros((1, 4, 14, 1)))


def test_a_stored_table_begins_as_the_positions():
    made = initialise(lambda **options: _Patches(**options), seed=0)
    want = sincos_positions((6, 6), 8, base=4, scale=0.5)
    np.testing.assert_array_equal(made.pos_embed[...][0], want)


def _Patches(*, rngs):  # noqa: N802 - a class to `initialise`
    return PatchEmbed(1, 8, 2, layers=LayerFactory(rngs=rngs), base=4, scale=0.5, max_size=6)


def test_patches_are_put_back():
    image = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3).astype(np.float32)
    patches = [image[:, r : r + 2, c : c + 2].reshape(2, -1) for r in (0, 2) for c in (0, 2, 4)]
    tokens = jnp.asarray(np.stack(patches, axis=1))
    np.testing.assert_array_equal(unpatchify(tokens, (2, 3), 2), image)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_type": "ada_norm"}, "norm_type: got 'ada_norm', expected one of ada_norm_zero"),
        ({"activation_fn": "gelu_approximate"}, "did you mean 'gelu-approximate'"),
        ({"num_layers": 0}, "num_layers: got 0, expected a number above 0"),
        ({"attention_head_dim": 9, "num_attention_heads": 1}, "width: got 9, expected a multiple"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        DiTTransformer2DModel(DiTTransformer2DConfig(**fields), rngs=None)


def test_sides_are_whole_patches(model):
    with pytest.raises(InputError, match="latent height: got 7, expected a multiple of the patch"):
        model(jnp.zeros((1, 7, 8, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
