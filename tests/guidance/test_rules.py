"""Guidance rules on vectors worked out by hand, and the identities that tie them together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian, level_at, mixture, ratio_grid

from jaxdiff.diffusion.denoising import predict, target
from jaxdiff.diffusion.grids import karras
from jaxdiff.guidance.base import CONDITIONAL, GUIDED, RULES, DenoiserInput, GuidanceScales, parse
from jaxdiff.guidance.denoiser import ConditionedNetwork, guided_denoiser, stack_streams
from jaxdiff.guidance.scale_schedules import SCALE_CURVES
from jaxdiff.samplers.base import SAMPLERS
from jaxdiff.samplers.sampling import sample

UNCOND = jnp.array([[0.0, 1.0, 1.0, 2.0]])
COND = jnp.array([[1.0, 2.0, 3.0, 4.0]])
X = jnp.array([[0.3, -0.2, 1.1, 0.4]])


def asked(kind, ratio=1.0, step=5, x=X):
    return DenoiserInput(x, level_at(jnp.asarray(ratio, x.dtype), step=step), kind)


def combine(text, outputs, w, *, kind="epsilon", memory=None, **more):
    """The prediction of a rule; `outputs` are its streams', `more` goes to the query."""
    rule, query = parse(text), asked(kind, **more)
    memory = rule.init_state(query.x) if memory is None else memory
    return rule.combine(outputs, query, GuidanceScales(jnp.full(len(query.x), w)), memory)


def raw(text, outputs, w, *, kind="epsilon", **more):
    """The network's output that would mean the prediction of a rule."""
    prediction, _ = combine(text, outputs, w, kind=kind, **more)
    return asked(kind, **more).output(prediction)


def close(got, expected, **limits):
    np.testing.assert_allclose(got, expected, **({"rtol": 1e-5, "atol": 1e-5} | limits))


# Streams


@pytest.mark.parametrize(
    ("name", "streams", "at_scale_one"),
    [
        ("none", 1, 1),
        ("cfg", 2, 1),
        ("negative", 3, 3),
        ("apg", 2, 1),
        ("cfg-pp", 2, 2),
        ("cfg-zero-star", 2, 2),
        ("pag", 3, 2),
        ("autoguidance", 2, 1),
        ("cfg+schedule+rescale+interval", 2, 1),
        ("cfg+clip-sample", 2, 1),
    ],
)
def test_how_many_streams_rules_have(name, streams, at_scale_one):
    rule = parse(name)
    assert len(rule.streams) == streams
    assert len(rule.simplify([1.0, 1.0]).streams) == at_scale_one
    assert rule.simplify([1.0, 2.0]).streams == rule.streams


def test_at_scale_one_only_wrappers_that_change_the_plain_model_are_left():
    assert parse("cfg+schedule+rescale+interval+adaptive").simplify([1.0]) == RULES["none"]
    assert parse("cfg+rescale+clip-sample").simplify([1.0]) == parse("none+clip-sample")


# Rescale


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_golden_rescale(kind):
    streams = (UNCOND, COND)
    expected = [[1.626978, 2.169305, 3.796283, 4.338609]]
    close(raw("cfg+rescale:phi=1", streams, 3.0, kind=kind), expected)
    expected = [[2.038885, 2.718513, 4.757398, 5.437026]]
    close(raw("cfg+rescale:phi=0.7", streams, 3.0, kind=kind), expected)
    close(raw("cfg+rescale:phi=0", streams, 3.0, kind=kind), [[3, 4, 7, 8]])


def test_full_rescale_has_the_spread_of_each_conditional_output():
    cond, uncond = (jax.random.normal(jax.random.key(i), (3, 4, 4, 2)) for i in (0, 1))
    x = jax.random.normal(jax.random.key(2), cond.shape)
    g = raw("cfg+rescale:phi=1", (uncond, cond), 7.5, x=x)
    close(jnp.std(g, (1, 2, 3)), jnp.std(cond, (1, 2, 3)))


# Projection


def test_golden_apg_on_denoised_images():
    expected = [[1.866667, 1.733333, 3.6, 3.466667]]
    close(raw("apg", (UNCOND, COND), 3.0, kind="sample"), expected)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_apg_with_everything_kept_is_cfg(kind):
    close(raw("apg:eta=1", (UNCOND, COND), 3.0, kind=kind), [[3, 4, 7, 8]])


def test_apg_is_orthogonal_to_the_conditional_image_and_no_longer_than_its_threshold():
    prediction, _ = combine("apg:norm_threshold=0.5", (UNCOND, COND), 2.0, kind="sample")
    step = prediction.x0 - COND
    assert float(jnp.sum(step * COND)) == pytest.approx(0, abs=1e-6)
    assert float(jnp.linalg.norm(step)) <= 0.5
    (wide, _), _ = combine("apg:norm_threshold=0.5,eta=1", (UNCOND, COND), 2.0, kind="sample")
    assert float(jnp.linalg.norm(wide - COND)) == pytest.approx(0.5, rel=1e-6)


def test_apg_momentum_adds_the_steps_before():
    d = COND - UNCOND
    memory = jnp.array([[1.0, 0.0, -2.0, 0.5]])
    text = "apg:eta=1,momentum=-0.5"
    prediction, after = combine(text, (UNCOND, COND), 2.0, kind="sample", memory=memory)
    close(after, d - 0.5 * memory)
    close(prediction.x0, COND + d - 0.5 * memory)


def test_apg_of_equal_streams_has_no_direction_and_no_nan():
    close(raw("apg", (COND, COND), 9.0, kind="sample"), COND)
    zero = jnp.zeros((1, 4))
    close(raw("apg", (zero, zero), 9.0, kind="sample"), zero)


# CFG-Zero*


def test_golden_zero_star_on_velocities():
    streams = (UNCOND, COND)
    close(raw("cfg-zero-star", streams, 3.0, kind="flow_prediction"), [[3, 5 / 3, 14 / 3, 10 / 3]])
    close(raw("cfg-zero-star", streams, 1.0, kind="flow_prediction"), COND)
    close(raw("cfg-zero-star", streams, 0.0, kind="flow_prediction"), 13 / 6 * UNCOND)


def test_zero_star_of_perpendicular_velocities_is_the_scaled_conditional_one():
    uncond, cond = jnp.array([[1.0, 0, 0, 0]]), jnp.array([[0, 2.0, 1, 0]])
    close(raw("cfg-zero-star", (uncond, cond), 3.0, kind="flow_prediction"), 3 * cond)


def test_zero_star_means_the_same_whatever_the_network_predicts():
    """Each kind says the same two predictions; only the velocity decides."""
    level = asked("epsilon", 0.8).level
    images = [jnp.array([[0.5, -0.1, 0.2, 0.9]]), jnp.array([[0.1, 0.3, -0.6, 0.2]])]
    made = {}
    for kind in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        noises = [predict("sample", D, X, level.alpha, level.sigma).eps for D in images]
        pairs = zip(images, noises, strict=True)
        streams = tuple(target(kind, D, e, level.alpha, level.sigma) for D, e in pairs)
        made[kind], _ = combine("cfg-zero-star", streams, 4.0, kind=kind, ratio=0.8)
    for kind, prediction in made.items():
        for got, expected in zip(prediction, made["flow_prediction"], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=kind)


def test_zero_star_stands_still_in_its_first_steps():
    """x / (alpha + sigma), the place on the flow's own path, does not move."""
    there = level_at(jnp.float32(0.4))
    # whatever wraps it, and outside of an interval too
    for text in ("cfg-zero-star:zero_steps=2", "cfg-zero-star:zero_steps=2+rescale+interval:lo=2"):
        rule = parse(text)
        both, dials = jnp.stack([UNCOND, COND], axis=1), GuidanceScales(jnp.full(1, 3.0))
        denoise = guided_denoiser(
            lambda w, x, t, told: told, (), both, dials, rule=rule, prediction_type="epsilon"
        )
        for step, still in ((0, True), (1, True), (2, False)):
            here = asked("epsilon", step=step).level
            (D, eps), _ = denoise(X, here, rule.init_state(X))
            places = [(level.alpha + level.sigma) for level in (there, here)]
            moved = (there.alpha * D + there.sigma * eps) / places[0] - X / places[1]
            assert bool(jnp.all(jnp.abs(moved) < 1e-6)) == still


# CFG++


def test_manifold_constrained_guidance_takes_the_noise_of_the_null_stream():
    query = asked("epsilon")
    none, _ = combine("cfg-pp", (UNCOND, COND), 0.0)
    close(none.x0, query.predict(UNCOND).x0)
    half, _ = combine("cfg-pp", (UNCOND, COND), 0.5)
    close(half.x0, query.predict((UNCOND + COND) / 2).x0)
    close(half.eps, UNCOND)


def test_manifold_constrained_guidance_is_cfg_with_a_growing_scale():
    """A step from r to r' is that of w = lambda r / (r - r')."""
    r, low, scale = 2.0, 0.7, 0.4
    here, there = (level_at(jnp.float32(ratio)) for ratio in (r, low))
    got, _ = combine("cfg-pp", (UNCOND, COND), scale, ratio=r)
    expected, _ = combine("cfg", (UNCOND, COND), scale * r / (r - low), ratio=r)
    close(
        there.alpha * got.x0 + there.sigma * got.eps,
        there.alpha * expected.x0 + there.sigma * expected.eps,
    )
    assert here.sigma.item() != there.sigma.item()


# A negative stream, several prompts


def test_three_streams_and_two():
    negative = jnp.array([[2.0, 0.0, -1.0, 0.5]])
    streams, query = (UNCOND, COND, negative), asked("epsilon")
    rule = RULES["negative"]

    def negative_rule(w, wn=None, streams=streams):
        dials = GuidanceScales(jnp.array([w]), None if wn is None else jnp.array([wn]))
        return rule.combine(streams, query, dials, ())[0].eps

    close(negative_rule(3.0), UNCOND + 3 * (COND - negative))
    close(negative_rule(3.0, 0.0), [[3, 4, 7, 8]])
    close(negative_rule(3.0, 5.0, (UNCOND, COND, UNCOND)), [[3, 4, 7, 8]])
    close(negative_rule(4.0, 3.0), negative + 4 * (COND - negative))
    close(negative_rule(6.0, None, (UNCOND, COND, COND)), UNCOND)


def test_a_perpendicular_negative_leaves_the_step_towards_the_prompt():
    negative = jnp.array([[2.0, 0.0, -1.0, 0.5]])
    streams, towards = (UNCOND, COND, negative), COND - UNCOND
    g = raw("negative:perpendicular=true", streams, 3.0)
    share = jnp.sum((g - UNCOND) * towards) / jnp.sum(towards * towards)
    assert float(share) == pytest.approx(3, rel=1e-5)
    # a negative on the line of the prompt is without effect
    on_line = (UNCOND, COND, UNCOND + 2 * towards)
    close(raw("negative:perpendicular=true", on_line, 3.0), [[3, 4, 7, 8]])


def test_prompts_compose_and_weights_of_equal_ones_add():
    rule, query = RULES["cfg"].for_prompts(2), asked("epsilon")
    assert [s.prompt_source for s in rule.streams] == ["negative", "prompt", "prompt"]
    other = jnp.array([[2.0, 0.0, -1.0, 0.5]])

    def made(streams, weights, w=1.0):
        return rule.combine(streams, query, GuidanceScales(jnp.array([w]), None, weights), ())[
            0
        ].eps

    both = jnp.array([[2.0, -0.5]])
    expected = UNCOND + 3 * (2 * (COND - UNCOND) - 0.5 * (other - UNCOND))
    close(made((UNCOND, COND, other), both, 3.0), expected)
    close(made((UNCOND, COND, COND), jnp.array([[1.0, 2.0]])), [[3, 4, 7, 8]])
    close(made((UNCOND, COND, other), jnp.array([[3.0, 0.0]])), [[3, 4, 7, 8]])
    assert RULES["cfg"].for_prompts(1) == RULES["cfg"]


def mean_under(rule, means, dials, v=0.3):
    """Where the ODE guided by `rule` takes the mean of N(m_i, v), one for each stream."""
    streams = [(jnp.full(2, m), jnp.full(2, v)) for m in means]
    denoise = guided_denoiser(
        gaussian("epsilon"),
        (),
        stack_streams(*streams),
        dials,
        rule=rule,
        prediction_type="epsilon",
    )
    grid = ratio_grid(np.append(karras(500.0, 0.01, 300), 0), jnp.float64)
    keys = jax.vmap(jax.random.key)(jnp.arange(2, dtype=jnp.uint32))
    return sample(denoise, jnp.zeros(2), grid, keys, sampler=SAMPLERS["dpmpp-2m"])


def test_means_of_equal_gaussians_add_as_the_streams_do():
    """Exact for equal variances; section by section the same line as the streams'."""
    mu, mp, mn, w, wn = 0.2, 1.0, -0.5, 3.0, 1.5
    with jax.enable_x64(True):
        scale = jnp.full(2, w)
        two = mean_under(RULES["cfg"], (mn, mp), GuidanceScales(scale))
        close(two, w * mp + (1 - w) * mn, rtol=5e-3)
        guided = mean_under(RULES["negative"], (mu, mp, mn), GuidanceScales(scale, jnp.full(2, wn)))
        close(guided, mu + w * (mp - mu) - wn * (mn - mu), rtol=5e-3)
        weights = jnp.tile(jnp.array([[1.0, -0.4]]), (2, 1))
        several = mean_under(
            RULES["cfg"].for_prompts(2), (mu, mp, mn), GuidanceScales(scale, None, weights)
        )
        close(several, mu + w * ((mp - mu) - 0.4 * (mn - mu)), rtol=5e-3)


# Weaker models


def test_autoguidance_with_the_same_or_an_unconditional_network():
    same, _ = combine("autoguidance", (COND, COND), 8.0)
    close(same.eps, COND)
    weak, _ = combine("autoguidance", (UNCOND, COND), 3.0)
    close(weak.eps, [[3, 4, 7, 8]])


def test_autoguidance_runs_two_networks_on_their_own_conditions():
    def network(weights, x, t, conditioning):
        return weights * x + conditioning[:, None]

    cond, weak = jnp.array([[0.5]]), jnp.array([[0.1]])
    guide = ConditionedNetwork(network, 2.0, weak, "epsilon")
    dials = GuidanceScales(jnp.array([3.0]))
    rule = RULES["autoguidance"]
    denoise = guided_denoiser(
        network, 1.0, cond, dials, rule=rule, prediction_type="epsilon", guidance_model=guide
    )
    (_, eps), _ = denoise(X, asked("epsilon").level, ())
    main, other = X + 0.5, 2 * X + 0.1
    close(eps, other + 3 * (main - other))


def test_perturbed_attention_beside_cfg_and_alone():
    perturbed = jnp.array([[0.5, 2.0, 2.0, 5.0]])
    close(raw("pag:scale=0", (UNCOND, COND, perturbed), 3.0), [[3, 4, 7, 8]])
    close(raw("pag:scale=2", (UNCOND, COND, COND), 3.0), [[3, 4, 7, 8]])
    both = raw("pag:scale=2", (UNCOND, COND, perturbed), 3.0)
    close(both, jnp.array([[3.0, 4, 7, 8]]) + 2 * (COND - perturbed))
    alone = parse("pag:scale=2").simplify([1.0])
    assert [s.perturbed for s in alone.streams] == [False, True]
    got, _ = alone.combine((COND, perturbed), asked("epsilon"), GuidanceScales(jnp.ones(1)), ())
    close(got.eps, COND + 2 * (COND - perturbed))
    # which is what adaptive guidance compares, not the prompt with itself
    np.testing.assert_array_equal(
        alone.uncond_and_cond((COND, perturbed), GuidanceScales(jnp.ones(1)))[0], perturbed
    )


def test_a_network_is_told_which_streams_are_perturbed():
    def network(weights, x, t, conditioning, perturbed):
        return jnp.where(perturbed[:, None], 0.0, x) + conditioning[:, None]

    streams = jnp.array([[0.0, 1.0, 1.0]])
    dials, rule = GuidanceScales(jnp.array([3.0])), parse("pag:scale=2")
    denoise = guided_denoiser(network, (), streams, dials, rule=rule, prediction_type="epsilon")
    (_, eps), _ = denoise(X, asked("epsilon").level, ())
    close(eps, X + 3 + 2 * X)


# Thresholds


def test_thresholds_bound_the_image_and_refit_the_noise():
    image = jnp.array([[0.5, -3.0, 2.0, 1.0]])
    x = jax.random.normal(jax.random.key(0), (1, 4))
    clipped, _ = combine("none+clip", (image,), 1.0, kind="sample", x=x)
    close(clipped.x0, [[0.5, -1, 1, 1]])
    # the largest of 4 values is the percentile 1
    bound, _ = combine("none+threshold:percentile=1", (image,), 1.0, kind="sample", x=x)
    close(bound.x0, image / 3)
    # between the sorted values .5 1 2 3, a third of the way is 1
    third, _ = combine(f"none+threshold:percentile={1 / 3}", (image,), 1.0, kind="sample", x=x)
    close(third.x0, [[0.5, -1, 1, 1]])
    # the percentile counts up to 1.5
    held, _ = combine("none+threshold:percentile=1,max_limit=1.5", (image,), 1, kind="sample", x=x)
    close(held.x0, jnp.clip(image, -1.5, 1.5) / 1.5)
    small, _ = combine("none+threshold", (image / 4,), 1.0, kind="sample", x=x)
    close(small.x0, image / 4)
    level = asked("sample").level
    close(level.alpha * bound.x0 + level.sigma * bound.eps, x)


# Timing


@pytest.mark.parametrize(
    ("ratio", "inside"), [(0.3, False), (0.31, True), (5.0, True), (5.1, False)]
)
def test_an_interval_is_open_below_and_closed_above(ratio, inside):
    rule = parse("cfg+interval:lo=0.3,hi=5")
    mode = rule.mode(level_at(jnp.float32(ratio)), ())
    assert mode.item() == (GUIDED if inside else CONDITIONAL)


def test_an_interval_of_everything_is_cfg_and_of_nothing_the_plain_model():
    network = mixture("epsilon", (-2.0, 2.0), (0.25, 0.25))
    null, cond = jnp.array([[0.5, 0.5]]), jnp.array([[0.0, 1.0]])
    dials, level = GuidanceScales(jnp.array([3.0])), level_at(jnp.float32(1.3))

    def denoised(text, streams):
        rule = parse(text)
        denoise = guided_denoiser(network, (), streams, dials, rule=rule, prediction_type="epsilon")
        return denoise(X, level, rule.init_state(X))[0].x0

    both = stack_streams(null, cond)
    close(denoised("cfg+interval", both), denoised("cfg", both))
    close(denoised("cfg+interval:hi=0", both), denoised("none", cond[:, None]))
    # thresholds hold outside the interval too
    bounded = denoised("cfg+interval:hi=0+clip:limit=0.5", both)
    close(bounded, jnp.clip(denoised("none", cond[:, None]), -0.5, 0.5))


def test_a_step_is_inside_the_interval_as_a_whole():
    rule = parse("cfg+interval:lo=1")
    here, there = (level_at(jnp.float32(ratio)) for ratio in (1.5, 0.5))
    assert rule.mode(there.as_substep_of(here, here.active), ()).item() == GUIDED
    assert rule.mode(there, ()).item() == CONDITIONAL


def test_adaptive_guidance_stops_for_each_image_by_itself():
    uncond = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    cond = jnp.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # cosines 1, 0 and .707
    x = jnp.zeros((3, 2))
    rule, query = parse("cfg+adaptive:cosine=0.7"), asked("epsilon", x=x)
    dials = GuidanceScales(jnp.full(3, 3.0))
    denoise = guided_denoiser(
        lambda w, x, t, told: told,
        (),
        stack_streams(uncond, cond),
        dials,
        rule=rule,
        prediction_type="epsilon",
    )
    first, memory = denoise(x, query.level, rule.init_state(x))
    close(first.eps, uncond + 3 * (cond - uncond))
    np.testing.assert_array_equal(memory[1], [True, False, True])
    modes = [CONDITIONAL, GUIDED, CONDITIONAL]
    np.testing.assert_array_equal(rule.mode(query.level, memory), modes)
    second, memory = denoise(x, query.level, memory)
    close(second.eps[jnp.array([0, 2])], cond[jnp.array([0, 2])])
    close(second.eps[1], uncond[1] + 3 * (cond[1] - uncond[1]))
    assert np.all(rule.mode(query.level, ((), jnp.ones(3, bool))) == CONDITIONAL)


@pytest.mark.parametrize("name", SCALE_CURVES)
def test_schedules_keep_the_mean_scale(name):
    steps = 1000
    shares = (jnp.arange(steps, dtype=jnp.float32) + 0.5) / steps
    assert float(jnp.mean(SCALE_CURVES[name](shares))) == pytest.approx(1, abs=1e-5)
    assert float(jnp.min(SCALE_CURVES[name](shares))) >= 0


def test_a_schedule_is_of_the_scale_above_one():
    """At half of the steps the linear curve is 1; at the first it is 0, the plain model."""
    for step, expected in ((5, [[3, 4, 7, 8]]), (0, COND)):
        close(raw("cfg+schedule", (UNCOND, COND), 3.0, step=step), expected)
    close(raw("cfg+schedule", (UNCOND, COND), 1.0, step=3), COND)
    close(raw("cfg+schedule", (UNCOND, COND), 0.25, step=9), UNCOND)  # not below 0
