"""The loop as a compiled program: one contract for every sampler in the registry."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracles import RATIO_SCHEDULE, calls, equations, mixture, ratio_grid

from jaxdiff.checkpoints.timestep_grids import make_grid
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.grids import karras
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.guidance.base import RULES, GuidanceScales, parse
from jaxdiff.guidance.denoiser import guided_denoiser, stack_streams
from jaxdiff.samplers.base import (
    SAMPLERS,
    get_sampler,
    init_state,
    per_sample_keys,
    run_steps,
    step_noise,
)
from jaxdiff.samplers.sampling import initial_noise, sample

# with options that make a sampler stochastic
DRAWING = [f"{name}:{o}=1" for name, each in SAMPLERS.items() for o in each.stochastic_options]
STOCHASTIC = {*DRAWING, *(name for name, each in SAMPLERS.items() if each.stochastic)}
MEANS, VARIANCES = (-2.0, 2.0), (0.25, 0.25)
SHAPE = (4, 4, 2)
KIND = "v_prediction"
SCHEDULE = VPSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@jax.jit
def network(weights, x, t, conditioning):
    """A network that has weights, sees its image as a whole, and guides by its conditioning."""
    h = jnp.einsum("nhwc,cd->nhwd", x, weights) + jnp.mean(x, axis=(1, 2), keepdims=True)
    return jnp.tanh(h + conditioning[:, None, None, :] + jnp.sin(t)[:, None, None, None] / 10)


WEIGHTS = jnp.array([[0.5, -0.3], [0.2, 0.7]])


def inputs(seeds=(0, 1, 2, 3, 4, 5, 6, 7)):
    """Latents, conditioning of two streams, scales and keys of images known by their seed."""
    keys = per_sample_keys(seeds)
    latents = initial_noise(keys, SHAPE)
    cond = jnp.stack([jnp.sin(jnp.arange(2.0) + seed) for seed in seeds])
    scales = jnp.array([1.0 + seed for seed in seeds])
    return latents, stack_streams(jnp.zeros_like(cond), cond), scales, keys


def run(weights, latents, conditioning, scales, grid, keys, *, sampler, rule=RULES["cfg"]):
    """The whole path, as a pipeline composes it."""
    denoise = guided_denoiser(
        network, weights, conditioning, GuidanceScales(scales), rule=rule, prediction_type=KIND
    )
    memory = rule.init_state(latents)
    return sample(denoise, latents, grid, keys, sampler=sampler, guidance_state=memory)


def chunk(weights, carry, conditioning, scales, grid, keys, start, stop, *, sampler):
    """A part of it."""
    denoise = guided_denoiser(
        network,
        weights,
        conditioning,
        GuidanceScales(scales),
        rule=RULES["cfg"],
        prediction_type=KIND,
    )
    return run_steps(denoise, carry, grid, keys, start, stop, sampler=sampler)


RULE_SETS = {name: get_sampler(name).for_schedule(SCHEDULE) for name in (*SAMPLERS, *DRAWING)}


def grid_for(name, steps=7):
    return make_grid(SCHEDULE, name, steps, prediction_type=KIND, spacing="trailing")


@functools.cache
def compiled(name):
    return jax.jit(functools.partial(run, sampler=RULE_SETS[name]))


@functools.cache
def whole(name):
    latents, conditioning, scales, keys = inputs()
    return compiled(name)(WEIGHTS, latents, conditioning, scales, grid_for(name), keys)


def rounding(name):
    """Tolerances for the same computation in another program."""
    return dict.fromkeys(("rtol", "atol"), RULE_SETS[name].rounding)


@pytest.fixture(params=RULE_SETS)
def name(request):
    return request.param


def test_latents_are_finite_float32_and_differ(name):
    x = whole(name)
    assert x.shape == (8, *SHAPE)
    assert x.dtype == jnp.float32
    assert np.all(np.isfinite(x))
    assert len({image.tobytes() for image in np.asarray(x)}) == 8


def test_compiled_is_eager(name):
    latents, conditioning, scales, keys = inputs((3, 5))
    with jax.disable_jit():
        eager = run(
            WEIGHTS, latents, conditioning, scales, grid_for(name), keys, sampler=RULE_SETS[name]
        )
    np.testing.assert_allclose(eager, whole(name)[jnp.array([3, 5])], rtol=1e-5, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch(name):
    one = compiled(name)
    for seeds in ((4,), (7, 4), (6, 5, 4, 3, 2, 1, 0, 7)):
        latents, conditioning, scales, keys = inputs(seeds)
        x = one(WEIGHTS, latents, conditioning, scales, grid_for(name), keys)
        np.testing.assert_allclose(x, whole(name)[jnp.array(seeds)], **rounding(name))


def test_chunks_are_the_whole_bit_for_bit(name):
    latents, conditioning, scales, keys = inputs()
    sampler, grid = RULE_SETS[name], grid_for(name)
    part = jax.jit(functools.partial(chunk, sampler=sampler))

    def through(*stops):
        carry, start = init_state(grid.init_noise_sigma[0] * latents, sampler=sampler), 0
        for stop in stops:
            ends = jnp.int32(start), jnp.int32(stop)
            carry, start = part(WEIGHTS, carry, conditioning, scales, grid, keys, *ends), stop
        return carry

    one, many = through(7), through(1, 4, 4, 7)
    jax.tree.map(np.testing.assert_array_equal, many, one)
    np.testing.assert_allclose(many.x, whole(name), rtol=1e-5, atol=1e-6)


def test_one_compilation_for_any_prompts_seeds_scales_and_steps(name):
    traces = []

    @jax.jit
    def once(*arguments):
        traces.append(1)
        return run(*arguments, sampler=RULE_SETS[name])

    for seeds, steps in (((0, 1), 2), ((7, 9), 5), ((1, 1), 11)):
        latents, conditioning, scales, keys = inputs(seeds)
        once(WEIGHTS, latents, conditioning, scales, grid_for(name, steps), keys)
    assert len(traces) == 1


STEPS = [7, 3, 7, 1, 5, 2, 7, 4]  # of eight images


def own_grids(name, steps):
    """Grids of one row for each image, as long as the longest."""
    rows = [grid_for(name, n) for n in steps]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)


def test_images_with_steps_of_their_own_are_those_of_calls_of_their_own(name):
    latents, conditioning, scales, keys = inputs()
    program = compiled(name)
    mixed = program(WEIGHTS, latents, conditioning, scales, own_grids(name, STEPS), keys)
    for steps in sorted({*STEPS}):
        # the same program, since its shapes are the same
        grid = own_grids(name, [steps] * len(STEPS))
        alike = program(WEIGHTS, latents, conditioning, scales, grid, keys)
        chosen = [i for i, n in enumerate(STEPS) if n == steps]
        np.testing.assert_array_equal(mixed[jnp.array(chosen)], alike[jnp.array(chosen)])
        if steps == 7:
            shared = whole(name)[jnp.array(chosen)]
            np.testing.assert_allclose(mixed[jnp.array(chosen)], shared, **rounding(name))


@pytest.mark.parametrize(
    "text",
    [
        "apg:momentum=-0.5+interval:lo=0.3,hi=5",
        "cfg+adaptive:cosine=0.9",
        "cfg-zero-star:zero_steps=2+interval:lo=1",
        "cfg+schedule+rescale",
    ],
)
def test_rules_follow_the_level_of_each_image(text):
    rule, sampler = parse(text), SAMPLERS["heun"]
    latents, conditioning, scales, keys = inputs()

    @jax.jit
    def program(grid):
        denoise = guided_denoiser(
            network, WEIGHTS, conditioning, GuidanceScales(scales), rule=rule, prediction_type=KIND
        )
        memory, phase = rule.init_state(latents), rule.phase
        return sample(
            denoise,
            latents,
            grid,
            keys,
            sampler=sampler,
            guidance_state=memory,
            guidance_phase=phase,
        )

    mixed = program(own_grids("heun", STEPS))
    for steps in sorted({*STEPS}):
        alike = program(own_grids("heun", [steps] * len(STEPS)))
        chosen = jnp.array([i for i, n in enumerate(STEPS) if n == steps])
        # A call of the network with other streams in it rounds differently.
        np.testing.assert_allclose(mixed[chosen], alike[chosen], rtol=1e-6, atol=1e-6)


def test_images_that_begin_and_end_at_steps_of_their_own():
    """Image 0 runs steps 2 to 4, image 1 all of them: what chunks of a shared grid give."""
    latents, conditioning, scales, keys = inputs((0, 1))
    sampler, grid = SAMPLERS["euler-ancestral"], grid_for("euler-ancestral").for_images(2)
    part = jax.jit(functools.partial(chunk, sampler=sampler))

    def after(grid, stop):
        carry = init_state(latents, sampler=sampler)
        ends = jnp.int32(0), jnp.int32(stop)
        return part(WEIGHTS, carry, conditioning, scales, grid, keys, *ends).x

    middle = grid._replace(first=jnp.array([2, 2]), last=jnp.array([5, 5]))
    mixed = after(grid._replace(first=jnp.array([2, 0]), last=jnp.array([5, 7])), 7)
    np.testing.assert_array_equal(mixed, [after(middle, 3)[0], after(grid, 7)[1]])


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("cfg", 2 * 2 * 9),
        ("cfg+interval:hi=0", 2 * 9),
        # the first two steps of both are skipped
        ("cfg-zero-star:zero_steps=2", 2 * 2 * 7),
        ("cfg+interval:lo=1.5", None),  # guided while one of them is inside
    ],
)
def test_evaluations_are_saved_where_the_whole_batch_rests(text, rows):
    seen, rule = [], parse(text)

    def counting(weights, x, t, conditioning):
        jax.debug.callback(lambda t: seen.append(len(t)), t, ordered=True)
        return network(weights, x, t, conditioning)

    latents, conditioning, scales, keys = inputs((0, 1))
    grid = own_grids("ddim", [3, 9])
    denoise = guided_denoiser(
        counting, WEIGHTS, conditioning, GuidanceScales(scales), rule=rule, prediction_type=KIND
    )
    program = jax.jit(functools.partial(sample, denoise, sampler=SAMPLERS["ddim"]))
    jax.block_until_ready(program(latents, grid, keys))
    jax.effects_barrier()
    if rows is None:
        inside = (grid.sigma / grid.alpha)[:, :9] > 1.5
        initial = jnp.arange(9)[None] < grid.num_steps[:, None]
        rows = 2 * 9 + 2 * int(jnp.sum(jnp.any(inside & initial, axis=0)))
    assert sum(seen) == rows


@functools.cache
def traced(name, rule):
    """The traced program for 3 images."""
    latents, conditioning, scales, keys = inputs((0, 1, 2))
    conditioning = conditioning[:, -len(RULES[rule].streams) :]
    program = functools.partial(run, sampler=RULE_SETS[name], rule=RULES[rule])
    grid = grid_for(name)
    return jax.make_jaxpr(program)(WEIGHTS, latents, conditioning, scales, grid, keys).jaxpr


@pytest.mark.parametrize(("rule", "batch"), [("none", 3), ("cfg", 6)])
def test_a_network_call_is_on_all_streams(name, rule, batch):
    jaxpr = traced(name, rule)
    # Each call after the first is a branch that some steps do not take.
    count = max(RULE_SETS[name].nfe(9))
    assert [shapes[1] for shapes in calls(jaxpr, "network")] == [(batch, *SHAPE)] * count
    loops = [e for e in equations(jaxpr) if e.primitive.name == "while"]
    assert len(loops) == 1


def test_only_stochastic_samplers_draw(name):
    drawn = any("random" in e.primitive.name for e in equations(traced(name, "cfg")))
    assert drawn == (name in STOCHASTIC)


def raised_times(grid, steps, churn):
    """Where the steps with churn begin: churn / N higher, and at most sqrt 2 times."""
    ratio = np.asarray(grid.sigma[0, :steps] / grid.alpha[0, :steps], np.float64)
    return SCHEDULE.level_of(ratio * (1 + min(churn / steps, np.sqrt(2) - 1)))[0]


@functools.cache
def counted(name):
    """The program for two images, of a grid, and the times that it has asked the network for."""
    seen = []
    latents, conditioning, scales, keys = inputs((0, 1))

    def counting(weights, x, t, conditioning):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t, ordered=True)
        return network(weights, x, t, conditioning)

    @jax.jit
    def program(grid):
        dials = GuidanceScales(scales)
        denoise = guided_denoiser(
            counting, WEIGHTS, conditioning, dials, rule=RULES["cfg"], prediction_type=KIND
        )
        return sample(denoise, latents, grid, keys, sampler=RULE_SETS[name])

    return program, seen


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_the_network_is_asked_no_more_than_the_method_needs(name, steps):
    """Counted as it runs: at the start of each step, and as often as it says on the way to its end.

    Branches that are not taken cost nothing.
    """
    program, seen = counted(name)
    sampler, grid = RULE_SETS[name], grid_for(name, steps)
    seen.clear()
    jax.block_until_ready(program(grid))
    jax.effects_barrier()
    asked = np.split(np.array(seen), np.cumsum(sampler.nfe(steps))[:-1])
    assert [len(times) for times in asked] == sampler.nfe(steps)
    starts, ends = (np.array(grid.t[0, i : i + steps]) for i in (0, 1))
    if getattr(sampler, "s_churn", 0):  # steps begin where they are raised to
        starts = raised_times(grid, steps, sampler.s_churn)
        np.testing.assert_allclose([times[0] for times in asked], starts, rtol=1e-5)
    else:
        np.testing.assert_array_equal([times[0] for times in asked], starts)
    for times, start, end in zip(asked, starts, ends, strict=True):
        nearly = end * (1 - 1e-6)  # a time that is found by its level, in float32
        assert np.all((times[1:] >= nearly) & (times[1:] < start))


def test_scale_one_is_the_conditional_model(name):
    latents, conditioning, _, keys = inputs((0, 1))
    guided_by_one = compiled(name)(
        WEIGHTS, latents, conditioning, jnp.ones(2), grid_for(name), keys
    )
    plain = jax.jit(functools.partial(run, sampler=RULE_SETS[name], rule=RULES["none"]))
    alone = plain(WEIGHTS, latents, conditioning[:, 1:], jnp.ones(2), grid_for(name), keys)
    np.testing.assert_allclose(guided_by_one, alone, rtol=1e-5, atol=1e-5)


def test_a_negative_prompt_equal_to_the_prompt_leaves_the_scale_no_effect(name):
    latents, conditioning, scales, keys = inputs((0, 1))
    same = conditioning[:, jnp.array([1, 1])]
    one, other = (
        compiled(name)(WEIGHTS, latents, same, w, grid_for(name), keys)
        for w in (scales, 3 * scales)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_pmap_over_eight_devices_is_one_device(name):
    latents, conditioning, scales, keys = inputs()
    over_devices = jax.pmap(
        functools.partial(run, sampler=RULE_SETS[name]),
        axis_name="data",
        in_axes=(None, 0, 0, 0, None, 0),
    )
    split = [a.reshape(8, 1, *a.shape[1:]) for a in (latents, conditioning, scales, keys)]
    x = over_devices(WEIGHTS, *split[:3], grid_for(name), split[3])
    assert len(x.sharding.device_set) == 8
    np.testing.assert_allclose(x[:, 0], whole(name), **rounding(name))


def test_a_sharded_batch_exchanges_no_arrays(name):
    """At most one flag a step: whether any image needs the second evaluation."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    by_image, shared = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    latents, conditioning, scales, keys = (jax.device_put(a, by_image) for a in inputs())
    weights, grid = jax.device_put((WEIGHTS, grid_for(name)), shared)
    program = compiled(name).lower(weights, latents, conditioning, scales, grid, keys).compile()
    text = program.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    assert set(re.findall(r"(\S+) all-reduce\(", text)) <= {"pred[]"}
    x = program(weights, latents, conditioning, scales, grid, keys)
    np.testing.assert_allclose(x, whole(name), **rounding(name))


def test_zero_terminal_snr_starts_from_pure_noise(name):
    zero = VPSchedule(beta_schedule="scaled_linear", zero_terminal_snr=True)
    grid = make_grid(zero, name, 6, prediction_type=KIND, spacing="trailing")
    latents, conditioning, scales, keys = inputs()
    x = compiled(name)(WEIGHTS, latents, conditioning, scales, grid, keys)
    assert np.all(np.isfinite(x))


# Fine where the posterior of x0 narrows, so that first-order methods err less than 4e4 draws do.
FINE = np.concatenate([np.geomspace(2000, 8, 60), np.geomspace(7.9, 0.05, 640), [0.03, 0.01, 0]])
# For those that extrapolate from noisy steps no step may be much longer than the one before.
SMOOTH = np.append(karras(2000.0, 0.01, 300), 0)


# One that is no solver draws from no diffusion model: see test_convergence for LCM.
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, s in RULE_SETS.items() if s.order], indirect=True)
def test_samples_of_a_mixture_have_the_moments_of_their_class(name):
    """Class +2 of the mixture, w = 1: mean 2, variance .25, each within 3 standard errors."""
    images, elements = 100, 400  # a key for many elements: keys cost more than what they draw
    n = images * elements
    keys = jax.random.split(jax.random.key(0), images)
    conditioning = jnp.tile(jnp.array([[[0.0, 1.0]]]), (images, 1, 1))
    denoise = guided_denoiser(
        mixture("sample", MEANS, VARIANCES),
        (),
        conditioning,
        GuidanceScales(jnp.ones(images)),
        rule=RULES["none"],
        prediction_type="sample",
    )
    sampler = get_sampler(name).for_schedule(RATIO_SCHEDULE)
    program = jax.jit(functools.partial(sample, denoise, sampler=sampler))
    remembers = bool(jax.tree.leaves(sampler.init(jnp.zeros((1, 1)))))
    grid = ratio_grid(SMOOTH if sampler.stochastic and remembers else FINE)
    x = np.asarray(program(initial_noise(keys, (elements,)), grid, keys), np.float64)
    assert np.mean(x) == pytest.approx(2, abs=3 * np.sqrt(0.25 / n))
    assert np.var(x) == pytest.approx(0.25, abs=3 * 0.25 * np.sqrt(2 / n))


def test_noise_belongs_to_the_seed_and_the_step():
    keys = per_sample_keys([3, 2**32 - 1, 3])
    start = initial_noise(keys, SHAPE)
    np.testing.assert_array_equal(start[0], start[2])
    draws = [start, *(step_noise(keys, jnp.int32(i), SHAPE, start.dtype) for i in (0, 1))]
    assert len({a[i].tobytes() for a in map(np.asarray, draws) for i in (0, 1)}) == 6
    many = np.asarray(initial_noise(per_sample_keys(range(64)), SHAPE))
    assert np.mean(many) == pytest.approx(0, abs=4 / np.sqrt(many.size))
    assert np.var(many) == pytest.approx(1, abs=4 * np.sqrt(2 / many.size))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_would_collide_are_refused(seed):
    with pytest.raises(InputError, match=f"seed: got {seed}"):
        per_sample_keys([0, seed])
