"""One contract for every guidance rule in the registry, alone and wrapped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import level_at

from jaxdiff.core.errors import InputError
from jaxdiff.guidance.base import RULES, WRAPPERS, DenoiserInput, GuidanceScales, Wrapper, parse
from jaxdiff.guidance.denoiser import ConditionedNetwork, guided_denoiser

NAMES = [*RULES, *(f"cfg+{wrapper}" for wrapper in WRAPPERS), "apg+rescale+interval+threshold"]
SCALES = jnp.array([1.0, 4.0, 7.5])


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def rule(name):
    return parse(name)


def changes_unguided(rule):
    """Whether one of its wrappers says that it changes what all streams agree on."""
    return isinstance(rule, Wrapper) and (rule.changes_unguided or changes_unguided(rule.inner))


def outputs_for(rule, x):
    return tuple(jnp.sin(3 * x + i) for i in range(len(rule.streams)))


def images(n=3):
    return jax.random.normal(jax.random.key(0), (n, 4, 4, 2))


def combined(rule, outputs, x, scales=SCALES, step=2):
    query = DenoiserInput(x, level_at(jnp.float32(2.0), step=step, ndim=4), "epsilon")
    return rule.combine(outputs, query, GuidanceScales(scales), rule.init_state(x))


def test_predictions_and_memories_keep_their_shapes_and_dtypes(rule):
    x = images()
    prediction, memory = combined(rule, outputs_for(rule, x), x)
    assert prediction.x0.shape == prediction.eps.shape == x.shape
    assert prediction.x0.dtype == prediction.eps.dtype == jnp.float32
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (memory, rule.init_state(x)))
    assert shapes[0] == shapes[1]
    assert jax.tree.structure(memory) == jax.tree.structure(rule.init_state(x))


def test_images_do_not_see_one_another(rule):
    x, turn = images(), jnp.array([2, 0, 1])
    outputs = outputs_for(rule, x)
    straight, _ = combined(rule, outputs, x)
    turned, _ = combined(rule, tuple(o[turn] for o in outputs), x[turn], SCALES[turn])
    np.testing.assert_array_equal(turned.x0, straight.x0[turn])
    np.testing.assert_array_equal(turned.eps, straight.eps[turn])


def test_image_and_noise_fit_unless_the_rule_renoises_elsewhere(rule):
    x = images()
    (D, eps), _ = combined(rule, outputs_for(rule, x), x)
    level = level_at(jnp.float32(2.0), ndim=4)
    fits = np.allclose(level.alpha * D + level.sigma * eps, x, rtol=1e-4, atol=1e-5)
    assert fits == (not rule.capabilities.separate_eps)


def test_streams_that_agree_are_not_changed(rule):
    x = images()
    same = (jnp.tanh(x),) * len(rule.streams)
    (_, eps), _ = combined(rule, same, x)
    kept = np.allclose(eps, same[0], rtol=1e-4, atol=1e-5)
    assert kept == (not changes_unguided(rule))


def test_rules_are_pytrees_of_their_numbers(rule):
    leaves, structure = jax.tree.flatten(rule)
    assert all(isinstance(leaf, float) for leaf in leaves)
    assert jax.tree.unflatten(structure, leaves) == rule
    assert hash(jax.tree.unflatten(structure, leaves)) == hash(rule)


def test_traced_numbers_compile_nothing_new(rule):
    """jit equals eager, and another value of a number is no other program."""
    x = images()
    outputs = outputs_for(rule, x)
    program = jax.jit(lambda rule: combined(rule, outputs, x)[0])
    halved = jax.tree.map(lambda number: number / 2, rule)
    for each in (rule, halved):
        eager, _ = combined(each, outputs, x)
        for got, expected in zip(program(each), eager, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert program._cache_size() == 1


@pytest.mark.parametrize("name", RULES)
def test_an_evaluation_for_each_stream_and_one_without_guidance(name):
    """Counted while running, by a network that reports its batch."""
    seen = []

    def network(weights, x, t, conditioning, perturbed=None):
        jax.debug.callback(lambda x: seen.append(len(x)), x)
        return jnp.tanh(x)

    x, level = images(), level_at(jnp.float32(2.0), step=2, ndim=4)
    for text, expected in ((name, len(RULES[name].streams)), (f"{name}+interval:hi=1", 1)):
        rule = parse(text)
        guide = ConditionedNetwork(network, (), None, "epsilon")
        denoise = guided_denoiser(
            network,
            (),
            None,
            GuidanceScales(SCALES),
            rule=rule,
            prediction_type="epsilon",
            guidance_model=guide,
        )
        seen.clear()
        jax.block_until_ready(jax.jit(denoise)(x, level, rule.init_state(x)))
        jax.effects_barrier()
        assert sum(seen) == 3 * expected, text


def test_at_scale_one_the_cheapest_rule_gives_the_same(rule):
    """From those of its streams that it keeps."""
    cheap = rule.simplify([1.0, 1.0, 1.0])
    x = images()
    outputs = outputs_for(rule, x)
    chosen = tuple(outputs[rule.streams.index(stream)] for stream in cheap.streams)
    got, _ = combined(cheap, chosen, x, jnp.ones(3))
    expected, _ = combined(rule, outputs, x, jnp.ones(3))
    np.testing.assert_allclose(got.x0, expected.x0, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.eps, expected.eps, rtol=1e-4, atol=1e-5)
    assert rule.simplify([1.0, 2.0, 1.0]) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cgf", "guidance: got 'cgf', expected one of .* \\(did you mean 'cfg'"),
        ("interval", "guidance: got 'interval', expected one of none, cfg"),
        ("cfg+cfg", "guidance: got 'cfg', expected one of rescale"),
        ("apg:phi=1", "guidance: apg: got 'phi', expected one of eta, norm_threshold, momentum"),
        ("apg:eta", "guidance: apg: got 'eta', expected eta=VALUE"),
        ("apg:eta=1,eta=2", "guidance: apg: got 'eta=1,eta=2', expected each option once"),
        ("apg:eta=high", "guidance: eta: got 'high', expected a number"),
        ("apg:eta=-1", "guidance: eta: got -1.0, expected a number from 0"),
        ("cfg+rescale:phi=2", "guidance: phi: got 2.0, expected a number from 0 to 1"),
        ("cfg+interval:lo=nan", "guidance: lo: got nan, expected a number from 0"),
        ("cfg+schedule:curve=up", "guidance: curve: got 'up', expected one of constant"),
        ("negative:perpendicular=maybe", "got 'maybe', expected true or false"),
        ("cfg:num_prompts=2", "guidance: cfg: got 'num_prompts'"),
        ("cfg-pp+rescale", "got wrapper rescale for cfg-pp, expected interval or adaptive"),
        ("cfg-pp+interval+clip-sample", "got wrapper clip-sample for cfg-pp, expected interval or"),
        ("cfg-zero-star:zero_steps=-1", "guidance: zero_steps: got -1, expected a number from 0"),
        ("", "guidance: got ''"),
    ],
)
def test_bad_descriptions_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse(text)


def test_a_description_composes_from_the_inside_out():
    rule = parse("apg:eta=0.2, norm_threshold=15 + interval:lo=0.3,hi=5 + rescale")
    assert (rule.inner.inner.eta, rule.inner.inner.norm_threshold, rule.inner.lo, rule.phi) == (
        0.2,
        15.0,
        0.3,
        0.7,
    )


def test_a_second_network_must_be_there_and_may_predict_another_kind():
    x, level = images(), level_at(jnp.float32(2.0), ndim=4)

    def main(weights, x, t, conditioning):
        return jnp.tanh(x)

    def weak(weights, x, t, conditioning):  # the same image, said as v
        D = (x - level.sigma * jnp.tanh(x)) / level.alpha
        return level.alpha * jnp.tanh(x) - level.sigma * D

    rule = RULES["autoguidance"]
    with pytest.raises(InputError, match="guidance_model: got none, expected the weaker model"):
        guided_denoiser(
            main, (), None, GuidanceScales(SCALES), rule=rule, prediction_type="epsilon"
        )
    guide = ConditionedNetwork(weak, (), None, "v_prediction")
    denoise = guided_denoiser(
        main,
        (),
        None,
        GuidanceScales(SCALES),
        rule=rule,
        prediction_type="epsilon",
        guidance_model=guide,
    )
    (_, eps), _ = denoise(x, level, ())
    np.testing.assert_allclose(eps, jnp.tanh(x), atol=1e-5)
