"""Every guidance rule on velocities: the same step as for the same model seen otherwise.

The two streams of one model, once as a flow, x = (1 - s) x0 + s eps with velocities, and once with
alpha^2 + sigma^2 = 1 and noises. Rules that are defined in one space convert. One does not: rescale
belongs to the output of a network, as its paper has it, and so to what that predicts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import level_at

from jaxdiff.diffusion.denoising import target
from jaxdiff.guidance.base import RULES, WRAPPERS, GuidanceScales, parse
from jaxdiff.guidance.classifier_guidance import classifier_guidance, loss_guidance
from jaxdiff.guidance.denoiser import ConditionedNetwork, guided_denoiser

IN_RAW_OUTPUTS = {"rescale"}
NAMES = [
    *RULES,
    "negative:perpendicular=true",
    "apg:momentum=-0.5,norm_threshold=1",
    *(
        f"{rule}+{name}"
        for name, wrapper in WRAPPERS.items()
        for rule in ("cfg", "apg", "cfg-pp", "cfg-zero-star")
        if rule != "cfg-pp" or wrapper.keeps_separate_eps
    ),
]
N = 3
SCALES = GuidanceScales(jnp.array([0.3, 0.6, 0.9]))  # that of CFG++ goes to 1
SHARES = (0.9, 0.6, 0.35, 0.05)  # of noise, in steps 0 to 3


def flow_level(s, step, vp):
    """The level at the share s of noise of a flow; or of its variance-preserving view."""
    level = level_at(jnp.float32(s / (1 - s)), step=step, ndim=4)
    if vp:
        return level
    return level._replace(alpha=jnp.full((1,) * 4, 1 - s), sigma=jnp.full((1,) * 4, s))


def network(kind, scale):
    """Images that the conditioning moves, of X = x / (alpha + sigma): one model for both views."""

    def call(weights, x, t, conditioning, perturbed=False):
        level = flow_level_at(t, kind != "flow_prediction")
        alpha, sigma = (part[:, None, None, None] for part in level)
        shift = (conditioning + 0.5 * jnp.float32(perturbed))[:, None, None, None]
        D = jnp.sin(scale * x / (alpha + sigma) + shift)
        return target(kind, D, (x - alpha * D) / sigma, alpha, sigma)

    return call


def flow_level_at(ratio, vp):
    length = jnp.sqrt(1 + ratio**2) if vp else 1 + ratio
    return 1 / length, ratio / length


def denoiser(rule, kind):
    """The guided denoiser of a model that predicts `kind`, and its weaker one."""

    def conditioning(name):
        own = [float(i) for i, stream in enumerate(rule.streams) if stream.network == name]
        return jnp.tile(jnp.array(own), (N, 1))

    return guided_denoiser(
        network(kind, 1.0),
        (),
        conditioning("main"),
        SCALES,
        rule=rule,
        prediction_type=kind,
        guidance_model=ConditionedNetwork(
            network(kind, 0.8), (), conditioning("guidance_model"), kind
        ),
    )


def predictions(denoise, state, vp):
    """Of the levels of SHARES, which share the state of the rule."""
    X = jax.random.normal(jax.random.key(0), (N, 4, 4, 2))
    for step, s in enumerate(SHARES):
        level = flow_level(s, step, vp)
        prediction, state = denoise(X * (level.alpha + level.sigma), level, state)
        yield prediction


def both(name):
    rule = parse(name)
    state = rule.init_state(jnp.zeros((N, 4, 4, 2)))
    kinds = (("flow_prediction", False), ("epsilon", True))
    return [list(predictions(denoiser(rule, kind), state, vp)) for kind, vp in kinds]


def check_equal(flow, noise):
    for step, (one, other) in enumerate(zip(flow, noise, strict=True)):
        for got, expected in zip(one, other, strict=True):
            size = float(jnp.max(jnp.abs(expected)))
            np.testing.assert_allclose(got, expected, atol=2e-5 * max(size, 1), err_msg=str(step))


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_gives_the_same_step_for_a_flow_as_for_its_noises(name):
    flow, noise = both(name)
    if not any(wrapper in name for wrapper in IN_RAW_OUTPUTS):
        check_equal(flow, noise)
        return
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_equal(flow, noise)


@pytest.mark.parametrize("rule", [name for name in NAMES if "+" not in name and name != "none"])
def test_rules_do_something_here(rule):
    """Else the test above would say nothing."""
    (flow, _), (plain, _) = both(rule), both("none")
    assert any(not np.allclose(a.x0, b.x0, atol=1e-2) for a, b in zip(flow, plain, strict=True))


def log_prob(x, level):
    """Of a classifier of X."""
    return jnp.sum(jnp.cos(x / (level.alpha + level.sigma)), axis=(1, 2, 3))


def loss(D):
    return jnp.sum((D - 0.3) ** 2, axis=(1, 2, 3))


@pytest.mark.parametrize("guide", [classifier_guidance, loss_guidance])
def test_guidance_by_gradients_gives_the_same_step_too(guide):
    function, k = (log_prob if guide is classifier_guidance else loss), jnp.array([0.5, 1.0, 2.0])
    ends = []
    for kind, vp in (("flow_prediction", False), ("epsilon", True)):
        denoise = guide(denoiser(RULES["cfg"], kind), function, k)
        ends.append(list(predictions(denoise, (), vp)))
    check_equal(*ends)


@pytest.mark.parametrize("name", NAMES)
def test_velocities_are_guided_from_pure_noise_on(name):
    """At alpha = 0, where noises would say nothing: the step is finite, and leaves x if skipped."""
    rule = parse(name)

    def call(weights, x, t, conditioning, perturbed=False):
        return jnp.tanh(x + (conditioning + 0.5 * jnp.float32(perturbed))[:, None, None, None])

    own = [sum(s.network == n for s in rule.streams) for n in ("main", "guidance_model")]
    conditioning = [jnp.tile(jnp.arange(float(n)), (N, 1)) for n in own]
    weaker = ConditionedNetwork(call, (), conditioning[1], "flow_prediction")
    denoise = guided_denoiser(
        call,
        (),
        conditioning[0],
        SCALES,
        rule=rule,
        prediction_type="flow_prediction",
        guidance_model=weaker,
    )
    x = jax.random.normal(jax.random.key(1), (N, 4, 4, 2))
    level = level_at(jnp.float32(1.0), ndim=4)
    level = level._replace(
        alpha=0 * level.alpha,
        sigma=jnp.ones_like(level.sigma),
        step_start_sigma=jnp.array([jnp.inf]),
    )
    (D, eps), _ = denoise(x, level, rule.init_state(x))
    assert np.all(np.isfinite(D))
    np.testing.assert_allclose(eps, x, atol=1e-5)
