"""Guidance of networks that also say the variance of a step: which stream's it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import level_at

from jaxdiff.diffusion.denoising import Prediction
from jaxdiff.guidance.base import RULES, GuidanceScales, parse
from jaxdiff.guidance.classifier_guidance import classifier_guidance
from jaxdiff.guidance.denoiser import ConditionedNetwork, guided_denoiser

SCALES = GuidanceScales(jnp.array([1.0, 3.0]))
X = jax.random.normal(jax.random.key(0), (2, 4, 4, 2))
# Of each stream the offset of its noise and its variance, which has no part in guidance.
OFFSETS, VARIANCES = jnp.array([0.1, 0.7, -0.4]), jnp.array([0.2, -0.9, 0.5])


def network(weights, x, t, conditioning, perturbed=None, variance=False):
    offset, own = (c.reshape(-1, 1, 1, 1) for c in conditioning)
    mean = jnp.tanh(x + offset)
    return jnp.concatenate([mean, own + 0 * x], axis=-1) if variance else mean


def streams(rule, network="main"):
    """The conditioning of the rule's streams of one network."""
    own = jnp.array([i for i, s in enumerate(rule.streams) if s.network == network])
    return tuple(jnp.broadcast_to(a[own], (2, len(own))) for a in (OFFSETS, VARIANCES))


def denoiser(rule, *, variance):
    guide = None
    if any(s.network == "guidance_model" for s in rule.streams):
        conditioning = streams(rule, "guidance_model")
        guide = ConditionedNetwork(network, (), conditioning, "v_prediction")
    return guided_denoiser(
        network,
        (),
        streams(rule),
        SCALES,
        rule=rule,
        prediction_type="epsilon",
        guidance_model=guide,
        variance=variance,
    )


@pytest.mark.parametrize(
    "name", [*RULES, "cfg+rescale", "apg+threshold:limit=0.5", "cfg+schedule", "cfg+interval:hi=1"]
)
def test_the_variance_is_that_of_the_conditional_stream(name):
    """Image and noise are those of the network without it; a step in which a rule guides."""
    rule, level = parse(name), level_at(jnp.float32(2.0), step=3, ndim=4)
    plain, with_variance = (
        denoiser(rule, variance=variance)(X, level, rule.init_state(X))[0]
        for variance in (False, True)
    )
    assert plain.variance is None
    for got, wanted in zip(with_variance, plain, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        with_variance.variance, jnp.full_like(X, VARIANCES[rule.cond_stream])
    )


def test_several_prompts_make_one_variance():
    """As they make one stream: uncond + sum of w_i (cond_i - uncond), here with w = (2, 0.5)."""
    rule = RULES["cfg"].for_prompts(2)
    scales = SCALES._replace(weights=jnp.array([[2.0, 0.5]] * 2))
    denoise = guided_denoiser(
        network, (), streams(rule), scales, rule=rule, prediction_type="epsilon", variance=True
    )
    prediction, _ = denoise(X, level_at(jnp.float32(2.0), ndim=4), ())
    wanted = 0.2 + 2 * (-0.9 - 0.2) + 0.5 * (0.5 - 0.2)
    np.testing.assert_allclose(prediction.variance, jnp.full_like(X, wanted), rtol=1e-6)


def test_there_is_none_where_no_network_is_called():
    rule = parse("cfg-zero-star:zero_steps=2")
    level = level_at(jnp.float32(2.0), step=1, ndim=4)
    prediction, _ = denoiser(rule, variance=True)(X, level, rule.init_state(X))
    np.testing.assert_allclose(prediction.eps, prediction.x0, rtol=1e-5)  # at rest
    np.testing.assert_array_equal(prediction.variance, jnp.zeros_like(X))


def test_classifier_guidance_leaves_it_alone():
    rule, level = RULES["none"], level_at(jnp.float32(2.0), ndim=4)
    plain = denoiser(rule, variance=True)
    moved = classifier_guidance(plain, lambda x, _: -jnp.sum(x**2, (1, 2, 3)), jnp.ones(2))
    (before, _), (after, _) = plain(X, level, ()), moved(X, level, ())
    assert jnp.max(jnp.abs(before.x0 - after.x0)) > 0.1
    np.testing.assert_array_equal(after.variance, before.variance)


def test_predictions_unpack_into_image_and_noise():
    image, noise = Prediction(X, 2 * X, 3 * X)
    np.testing.assert_array_equal(jnp.stack([image, noise]), jnp.stack([X, 2 * X]))
