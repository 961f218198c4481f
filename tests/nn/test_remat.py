"""What gradients compute again, counted in their programs."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

from jaxdiff.nn import platforms
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.remat import REMAT
from jaxdiff.nn.resnet import ResnetBlock
from jaxdiff.nn.transformer import SpatialSelfAttention, SpatialTransformer
from jaxdiff.nn.unet_2d_blocks import DownBlock2D

SIDE, CHANNELS, DEPTH = 16, 8, 2


def counted(program):
    """How often each primitive is in a program and of use there, kernels by what they do."""
    found, used = collections.Counter(), set(map(id, program.outvars))
    for equation in reversed(program.eqns):
        if used.isdisjoint(map(id, equation.outvars)):
            continue
        used |= set(map(id, equation.invars))
        name = equation.primitive.name
        if name == "pallas_call":
            found[equation.params["name"].rpartition("_")[0]] += 1  # without its sizes
            continue
        found[name] += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
                if isinstance(inner, core.Jaxpr):
                    found += counted(inner)
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["here", "tpu"])
def gradients(request):
    """What the gradients of a stage consist of, by what is computed again; with a TPU's forms."""

    def program(remat):
        layers = LayerFactory(rngs=nnx.Rngs(0), attention="tpu", remat=remat)
        resnet = ResnetBlock(CHANNELS, CHANNELS, layers=layers, groups=2, eps=1e-5, act="silu")
        transformer = SpatialTransformer(
            CHANNELS, layers=layers, heads=2, context_width=4, depth=DEPTH, groups=2, linear=True
        )
        graph, params = nnx.split(DownBlock2D([resnet], [transformer]))

        def loss(params, x, context):
            states = nnx.merge(graph, params)(x, None, context)
            return jnp.sum(jnp.square(states[-1]))

        shapes = ((2, SIDE, SIDE, CHANNELS), (2, 5, 4))
        arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        return counted(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, *arrays).jaxpr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platforms, "has_tpu_compiler", lambda: request.param)
        return {remat: program(remat) for remat in REMAT}


@pytest.mark.parametrize(
    "product", ["dot_general", "conv_general_dilated", "attention_forward", "attention_backward"]
)
def test_products_are_kept(gradients, product):
    none, products, blocks = (gradients[name][product] for name in ("none", "products", "blocks"))
    assert none == products > 0
    assert blocks > none or product == "attention_backward"


@pytest.mark.parametrize("other", ["rsqrt", "logistic", "erf"])
def test_norms_and_activations_are_computed_again(gradients, other):
    assert gradients["products"][other] > gradients["none"][other] > 0


def test_statistics_are_kept(gradients):
    """Sums over pixels and channels are as many as without computing anything again."""
    assert gradients["products"]["reduce_sum"] == gradients["none"]["reduce_sum"]
    assert gradients["blocks"]["reduce_sum"] > gradients["none"]["reduce_sum"]


def test_each_block_is_computed_again_by_itself(gradients):
    """What is held at once is what one block of the stage holds, and the inputs of the others."""
    assert gradients["blocks"]["remat2"] == gradients["products"]["remat2"] == 1 + DEPTH
    assert gradients["none"]["remat2"] == 0


@pytest.mark.parametrize("remat", sorted(set(REMAT) - {"none"}))
def test_attention_between_pixels_has_the_same_gradient(remat):
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, CHANNELS))

    def gradient(remat):
        layers = LayerFactory(rngs=nnx.Rngs(0), remat=remat)
        block = SpatialSelfAttention(CHANNELS, layers=layers, heads=2, groups=2, eps=1e-5)
        loss = jax.grad(lambda x: jnp.sum(jnp.square(block(x))))
        return counted(jax.make_jaxpr(loss)(x).jaxpr)["remat2"], jax.jit(loss)(x)

    (none, expected), (again, found) = gradient("none"), gradient(remat)
    assert (none, again) == (0, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
