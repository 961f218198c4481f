"""One contract for every guidance rule in the registry, alone and wrapped."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import level_at

from jaxdiff.core.errors import InputError
from jaxdiff.guidance.base import RULES, WRAPPERS, DenoiserInput, GuidanceScales, parse
from jaxdiff.guidance.classifier_free import ClassifierFree
from jaxdiff.guidance.denoiser import ConditionedNetwork, guided_denoiser
from jaxdiff.guidance.rule import rule as make_rule
from jaxdiff.guidance.scale_schedules import GuidanceInterval
from jaxdiff.guidance.wrapper import Wrapper

NAMES = [*RULES, *(f"cfg+{wrapper}" for wrapper in WRAPPERS), "apg+rescale+interval+threshold"]
SCALES = jnp.array([1.0, 4.0, 7.5])


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def rule(name):
    return parse(name)


def keeps_unguided(rule):
    """Whether it and its wrappers say that they leave the conditional prediction as it is.

    None: one of the wrappers does not say.
    """
    if not isinstance(rule, Wrapper):
        return True
    simplify = type(rule).simplify
    if simplify is Wrapper.simplify_or_drop:
        return keeps_unguided(rule.inner)
    return False if simplify is Wrapper.simplify_inner else None


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
    assert keeps_unguided(rule) in (kept, None)


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


WRAPPED = [
    f"{name}+{wrapper}"
    for name, rule in RULES.items()
    for wrapper, each in WRAPPERS.items()
    if each.keeps_separate_eps or not rule.capabilities.separate_eps
]


def network(weights, x, t, conditioning, perturbed=False):
    shift = conditioning + jnp.float32(perturbed)
    return jnp.sin(weights * x + shift[:, None, None, None])


def predictions(rule, streams, scales, x):
    """Of the steps 0 to 3, inside and outside intervals, with conditioning of each of `streams`."""
    unlike = {stream: (i + 1.0) for i, stream in enumerate(streams)}

    def conditioning(name):
        own = [unlike[stream] for stream in rule.streams if stream.network == name]
        return jnp.tile(jnp.array(own), (len(x), 1))

    denoise = guided_denoiser(
        network,
        3.0,
        conditioning("main"),
        GuidanceScales(scales),
        rule=rule,
        prediction_type="epsilon",
        guidance_model=ConditionedNetwork(network, 2.0, conditioning("guidance_model"), "sample"),
    )
    state = rule.init_state(x)
    for step, ratio in enumerate((3.0, 1.5, 0.5, 0.1)):
        prediction, state = denoise(x, level_at(jnp.float32(ratio), step=step, ndim=4), state)
        yield prediction


def check_simplified(rule):
    """That it predicts the same with the streams that some scales do not need, and without."""
    x, streams = images(), rule.streams
    largest = min(rule.capabilities.max_scale, 7.5)
    for scales in ([0.0] * 3, [0.5] * 3, [1.0] * 3, [largest] * 3, [1.0, largest / 2, 0.0]):
        cheap = rule.simplify(scales)
        assert set(cheap.streams) <= set(streams)
        if cheap != rule:
            args = streams, jnp.array(scales), x
            for got, whole in zip(predictions(cheap, *args), predictions(rule, *args), strict=True):
                np.testing.assert_allclose(got.x0, whole.x0, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(got.eps, whole.eps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", dict.fromkeys([*NAMES, *WRAPPED]))
def test_the_simplified_rule_predicts_the_same(rule):
    check_simplified(rule)


@make_rule
class Sharpened(Wrapper):
    """A wrapper that reads the null stream: at w = 1 too it goes further."""

    def combine(self, outputs, inputs, scales, state):
        prediction, state = self.inner.combine(outputs, inputs, scales, state)
        uncond, cond = self.uncond_and_cond(outputs, scales)
        return inputs.predict(inputs.output(prediction) + (cond - uncond) / 10), state


def test_a_wrapper_keeps_all_streams_unless_it_says_otherwise():
    for rule in RULES.values():
        assert Sharpened(inner=rule).simplify([1.0]) == Sharpened(inner=rule)
        check_simplified(Sharpened(inner=rule))


@pytest.mark.parametrize("simplify", [Wrapper.simplify_inner, Wrapper.simplify_or_drop])
def test_a_wrong_simplify_is_found(simplify):
    @make_rule
    class Wrong(Sharpened):
        pass

    Wrong.simplify = simplify
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_simplified(Wrong(inner=RULES["cfg"]))


def test_simplify_is_not_inherited_by_another_rule():
    with pytest.raises(TypeError, match="Twice: got combine with the simplify of another rule"):

        class Twice(ClassifierFree):
            def combine(self, outputs, inputs, scales, state):
                return super().combine(outputs, inputs, scales._replace(scale=2 * scales.scale), ())

    with pytest.raises(TypeError, match="Late: got mode with the simplify of another rule"):

        class Late(GuidanceInterval):
            def mode(self, level, state):
                return self.inner.mode(level, state)

    class Renamed(ClassifierFree):
        """The same, by another name."""

    assert Renamed().simplify([1.0]) == RULES["none"]


POSTPONED = """
from __future__ import annotations

from jaxdiff.guidance.base import Number

from jaxdiff.guidance.rule import rule
from jaxdiff.guidance.wrapper import Wrapper


@rule
class Postponed(Wrapper):
    share: Number = 0.5
    steps: int = 3
"""


def test_numbers_are_found_where_annotations_are_postponed(tmp_path, monkeypatch):
    (tmp_path / "postponed_rule.py").write_text(POSTPONED)
    monkeypatch.syspath_prepend(tmp_path)
    rule = importlib.import_module("postponed_rule").Postponed(inner=RULES["apg"])
    inner = jax.tree.leaves(RULES["apg"])
    leaves, structure = jax.tree.flatten(rule)
    assert sorted(leaves) == sorted([*inner, 0.5])
    assert jax.tree.unflatten(structure, leaves) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cgf", "guidance: got 'cgf', expected one of .* \\(did you mean 'cfg'"),
        ("interval", "guidance: got 'interval', expected one of none, cfg"),
        ("cfg+cfg", "guidance: got 'cfg', expected one of rescale"),
        ("apg:phi=1", "guidance: apg: got 'phi', expected one of eta, norm_threshold, momentum"),
        ("apg:eta", "guidance: apg: got 'eta', expected OPTION=VALUE"),
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
