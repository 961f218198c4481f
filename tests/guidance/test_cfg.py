"""Guidance rules on vectors worked out by hand and on the exact scores of a Gaussian mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import calls, level_at, mixture, posterior_mean

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.denoising import PREDICTION_TYPES
from jaxdiff.guidance.base import RULES, DenoiserInput, GuidanceScales, extrapolate, parse
from jaxdiff.guidance.denoiser import guided_denoiser, stack_streams

UNCOND = jnp.array([[0.0, 1.0, 1.0, 2.0]])
COND = jnp.array([[1.0, 2.0, 3.0, 4.0]])
MEANS, VARIANCES = (-2.0, 2.0), (0.25, 0.25)
NULL, CLASS = jnp.array([0.5, 0.5]), jnp.array([0.0, 1.0])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def level(ratio, dtype=jnp.float32, ndim=2):
    return level_at(jnp.asarray(ratio, dtype), ndim=ndim)


def test_the_golden_vector():
    np.testing.assert_array_equal(extrapolate(UNCOND, COND, jnp.array([3.0])), [[3, 4, 7, 8]])


def test_some_channels_alone_are_guided():
    """The first three of four by w = 3, the last as the conditional stream has it; DiT's way."""
    here = level(1.0)
    rule = parse("cfg:channels=3")
    inputs = DenoiserInput(jnp.zeros((1, 4)), here, "epsilon")
    (_, eps), _ = rule.combine((UNCOND, COND), inputs, GuidanceScales(jnp.array([3.0])), ())
    np.testing.assert_allclose(eps, [[3, 4, 7, 4]], rtol=1e-6)
    (_, eps), _ = RULES["cfg"].combine((UNCOND, COND), inputs, GuidanceScales(jnp.array([3.0])), ())
    np.testing.assert_allclose(eps, [[3, 4, 7, 8]], rtol=1e-6)
    with pytest.raises(InputError, match="channels: got -1, expected a number from 0"):
        parse("cfg:channels=-1")


def test_scale_zero_and_one_are_the_two_streams():
    np.testing.assert_array_equal(extrapolate(UNCOND, COND, jnp.array([0.0])), UNCOND)
    np.testing.assert_allclose(extrapolate(UNCOND, COND, jnp.array([1.0])), COND, rtol=1e-6)


def test_equal_streams_ignore_the_scale():
    np.testing.assert_array_equal(extrapolate(COND, COND, jnp.array([7.5])), COND)


def test_each_image_has_its_own_scale():
    u, c = jnp.tile(UNCOND, (3, 1)), jnp.tile(COND, (3, 1))
    got = extrapolate(u, c, jnp.array([0.0, 1.0, 3.0]))
    np.testing.assert_array_equal(got, [UNCOND[0], COND[0], [3, 4, 7, 8]])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_golden_mixture(kind):
    """p = N(-2, .25) / 2 + N(2, .25) / 2, class +2, at x / alpha = .3, sigma / alpha = 1, w = 3."""
    here = level(1.0, jnp.float64, ndim=1)
    x = jnp.array([0.3]) * here.alpha
    conditioning = stack_streams(NULL[None].astype(x.dtype), CLASS[None].astype(x.dtype))
    network = mixture(kind, MEANS, VARIANCES)
    denoise = guided_denoiser(
        network,
        (),
        conditioning,
        GuidanceScales(jnp.array([3.0])),
        rule=RULES["cfg"],
        prediction_type=kind,
    )
    (D, eps), memory = denoise(x, here, ())
    np.testing.assert_allclose(D, 3.4320204472, atol=1e-9)
    # The score in x / alpha is -eps / ratio.
    np.testing.assert_allclose(-eps, 3.1320204472, atol=1e-9)
    assert memory == ()


@pytest.mark.usefixtures("x64")
def test_golden_denoisers_of_the_oracle():
    x = jnp.array([0.3])
    null, cond = (w[None].astype(x.dtype) for w in (NULL, CLASS))
    Du = posterior_mean(x, jnp.ones(1), jnp.ones(1), MEANS, VARIANCES, null)
    Dc = posterior_mean(x, jnp.ones(1), jnp.ones(1), MEANS, VARIANCES, cond)
    assert Du == pytest.approx(0.7739897764, abs=1e-9)
    assert Dc == pytest.approx(1.66, abs=1e-9)
    assert Dc - Du == pytest.approx(0.8860102236, abs=1e-9)


def traced(rule, batch=3):
    """The calls of the network when a batch is denoised once."""

    @jax.jit
    def network(weights, x, t, conditioning):
        return (x * conditioning[:, None, None, None]).astype(jnp.bfloat16)

    def run(x, conditioning, w):
        denoise = guided_denoiser(
            network, (), conditioning, GuidanceScales(w), rule=rule, prediction_type="epsilon"
        )
        return denoise(x, level(1.0, ndim=4), rule.init_state(x))

    x = jnp.ones((batch, 4, 4, 1))
    conditioning = jnp.ones((batch, len(rule.streams)))
    return calls(jax.make_jaxpr(run)(x, conditioning, jnp.ones(batch)).jaxpr, "network")


def test_all_streams_go_through_one_call():
    assert [shapes[0] for shapes in traced(RULES["cfg"])] == [(6, 4, 4, 1)]
    assert [shapes[0] for shapes in traced(RULES["none"])] == [(3, 4, 4, 1)]


def test_a_batched_call_is_two_calls():
    network = mixture("epsilon", MEANS, VARIANCES)
    x = jax.random.normal(jax.random.key(1), (4, 3))
    here = level(1.3)
    null, cond = jnp.tile(NULL, (4, 1)), jnp.tile(CLASS, (4, 1))
    w = jnp.array([0.0, 1.0, 2.5, 9.0])
    denoise = guided_denoiser(
        network,
        (),
        stack_streams(null, cond),
        GuidanceScales(w),
        rule=RULES["cfg"],
        prediction_type="epsilon",
    )
    (_, eps), _ = denoise(x, here, ())
    t = jnp.full(4, here.t[0])
    expected = extrapolate(network((), x, t, null), network((), x, t, cond), w)
    np.testing.assert_allclose(eps, expected, rtol=1e-6, atol=1e-6)


def test_combining_is_in_float32_whatever_the_network_computes_in():
    """In bfloat16 a difference of 1e-3 between the streams would round away."""
    step = 2.0**-7

    def network(weights, x, t, conditioning):
        return (jnp.ones_like(x) + conditioning[:, None] * step).astype(jnp.bfloat16)

    x, streams = jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]])
    denoise = guided_denoiser(
        network,
        (),
        streams,
        GuidanceScales(jnp.array([1.1])),
        rule=RULES["cfg"],
        prediction_type="epsilon",
    )
    (_, eps), _ = denoise(x, level(1.0), ())
    assert eps.dtype == jnp.float32
    np.testing.assert_allclose(eps, 1 + 1.1 * step, rtol=1e-6)


def test_a_model_without_conditioning():
    def network(weights, x, t, conditioning):
        assert conditioning is None
        return weights * x

    x = jnp.ones((2, 3))
    denoise = guided_denoiser(
        network,
        0.5,
        None,
        GuidanceScales(jnp.ones(2)),
        rule=RULES["none"],
        prediction_type="sample",
    )
    (D, _), _ = denoise(x, level(1.0), ())
    np.testing.assert_array_equal(D, 0.5 * x)


def test_conditioning_must_have_the_streams_of_the_rule():
    with pytest.raises(InputError, match=r"conditioning: got shape \(3, 1, 5\), expected"):
        guided_denoiser(
            max,
            (),
            jnp.ones((3, 1, 5)),
            GuidanceScales(jnp.ones(3)),
            rule=RULES["cfg"],
            prediction_type="epsilon",
        )
