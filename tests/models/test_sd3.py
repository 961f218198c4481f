"""SD3Transformer2DModel: what it is at first, what its positions are, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.core.configs import from_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.models.build import initialise, param_dict
from jaxdiff.models.sd3.adapter import SD3Adapter
from jaxdiff.models.sd3.blocks import JointTransformerBlock
from jaxdiff.models.sd3.config import SD3Transformer2DConfig
from jaxdiff.models.sd3.module import SD3Transformer2DModel
from jaxdiff.nn.layers import LayerFactory

FIELDS = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 2,
    "attention_head_dim": 4,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "caption_projection_dim": 8,
    "pooled_projection_dim": 5,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}
CONFIG = SD3Transformer2DConfig(**FIELDS)
POSITIONS = "pos_embed.pos_embed"


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(size=(8, 8)):
    arrays = draw(2, *size, 4), jnp.array([1.0, 700.0]), draw(2, 3, 6, seed=1)
    return arrays, {"pooled_projections": draw(2, 5, seed=2)}


@pytest.fixture(scope="module")
def model():
    return initialise(SD3Transformer2DModel, CONFIG, seed=0)


def test_the_output_is_zero_at_first(model):
    arrays, named = inputs()
    assert not np.any(jax.jit(model)(*arrays, **named))


@pytest.mark.parametrize("dual", [False, True])
def test_a_block_is_the_identity_at_first(dual):
    block = JointTransformerBlock(
        CONFIG, layers=LayerFactory(rngs=nnx.Rngs(0)), dual=dual, last=False
    )
    x, context, vector = draw(2, 5, 8), draw(2, 3, 8, seed=1), draw(2, 8, seed=2)
    for before, after in zip((x, context), block(x, context, vector), strict=True):
        np.testing.assert_array_equal(before, after)


def test_positions_have_no_gradient(model):
    arrays, named = inputs()
    graph, state = nnx.split(model)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, state)

    def loss(state):
        return jnp.square(nnx.merge(graph, state)(*arrays, **named)).mean()

    gradients = param_dict(nnx.merge(graph, jax.jit(jax.grad(loss))(moved)))
    assert not np.any(gradients.pop(POSITIONS))
    assert np.any(gradients["pos_embed.proj.kernel"])


@pytest.mark.parametrize("remat", ["products", "blocks"])
def test_rematerialised_it_is_the_same(model, remat):
    arrays, named = inputs()
    again = initialise(SD3Transformer2DModel, CONFIG, seed=0, remat=remat)

    def gradient(module):
        graph, state = nnx.split(module)
        state = jax.tree.map(lambda leaf: leaf + 0.1, state)
        return jax.grad(lambda s: nnx.merge(graph, s)(*arrays, **named).mean())(state)

    for a, b in zip(*map(jax.tree.leaves, (gradient(model), gradient(again))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_adapter_calls_it_with_its_conditioning(model):
    adapter = SD3Adapter(model, "flow_prediction")
    shapes = adapter.conditioning_shapes((8, 8), 3)
    arrays, named = inputs()
    cond = {"context": arrays[2], **named}
    assert {name: array.shape[1:] for name, array in cond.items()} == {
        name: shape.shape for name, shape in shapes.items()
    }
    params = {path: leaf + 0.1 for path, leaf in param_dict(model).items()}
    out = adapter(params, arrays[0], arrays[1], cond)
    assert out.shape == arrays[0].shape
    assert np.all(np.isfinite(out))
    assert adapter == SD3Adapter(
        initialise(SD3Transformer2DModel, CONFIG, seed=1), adapter.prediction_type
    )


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((7, 8), "latent height: got 7, expected a multiple of the patch size 2"),
        ((8, 18), "columns of patches: got 9, expected at most 8"),
    ],
)
def test_sizes_that_are_refused(model, size, message):
    arrays, named = inputs(size)
    with pytest.raises(InputError, match=message):
        model(*arrays, **named)


def test_widths_that_are_refused(model):
    (x, t, context), named = inputs()
    with pytest.raises(InputError, match="context"):
        model(x, t, context[..., :5], **named)
    with pytest.raises(InputError, match="pooled_projections"):
        model(x, t, context, pooled_projections=named["pooled_projections"][:, :4])


def test_a_small_transformer_has_no_blocks_to_skip(model):
    arrays, named = inputs()
    with pytest.raises(InputError, match="perturbed stream for a transformer of 2 blocks"):
        model(*arrays, **named, perturbed=jnp.array([False, True]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm: got 'layer_norm', expected one of None, rms_norm"),
        ({"caption_projection_dim": 12}, "caption_projection_dim: got 12, expected 8"),
        ({"dual_attention_layers": (0, 2)}, "dual_attention_layers: got 2, expected numbers"),
        ({"num_layers": 0}, "num_layers: got 0"),
    ],
)
def test_configs_that_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        from_mapping(SD3Transformer2DConfig, FIELDS | changes, source="config.json")
