"""Time grids: published lists, closed forms, and the options of checkpoints."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.checkpoints.schedulers import (
    SCHEDULERS,
    SchedulerOptions,
    prediction_type_of,
    sampler_name,
    schedule_of,
)
from jaxdiff.checkpoints.timestep_grids import convention_of, interpolate, make_grid, make_host_grid
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.grids import (
    SIGMA_SCHEDULES,
    SPACINGS,
    TIMESTEP_SPACINGS,
    TimestepGrid,
    karras,
)
from jaxdiff.diffusion.schedules import MAX_SIGMA, EDMSchedule, FlowSchedule, VPSchedule
from jaxdiff.samplers.base import SAMPLERS, get_sampler

SD = VPSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ZERO = VPSchedule(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True
)
SD_OPTIONS = SchedulerOptions(steps_offset=1, set_alpha_to_one=False)
PLAIN = "ddpm"  # whose convention is the default


def times(spacing, steps, options=None, sampler=PLAIN):
    return make_host_grid(SD, sampler, steps, options=options, spacing=spacing).t[:-1]


def test_published_lists():
    np.testing.assert_array_equal(times("leading", 50), np.arange(980, -1, -20))
    np.testing.assert_array_equal(times("leading", 50, SD_OPTIONS), np.arange(981, 0, -20))
    np.testing.assert_array_equal(times("linspace", 50)[[0, 1, 2, -1]], [999, 979, 958, 0])
    np.testing.assert_array_equal(times("trailing", 50)[[0, 1, -1]], [999, 979, 19])
    np.testing.assert_array_equal(times("trailing", 4), [999, 749, 499, 249])
    # one more point at the clean end
    np.testing.assert_array_equal(times("linspace", 2, sampler="unipc"), [999, 500])
    np.testing.assert_array_equal(times("leading", 49, sampler="unipc"), np.arange(980, 0, -20))


def test_one_step_starts_from_noise():
    for spacing in ("linspace", "trailing"):
        assert times(spacing, 1) == [999]


def test_karras_end_points_and_golden_numbers():
    ratio = karras(80.0, 0.002, 32)
    assert ratio[[0, -1]] == pytest.approx([80, 0.002], rel=1e-12)
    assert ratio[[17, 22]] == pytest.approx([1.6086, 0.2830], abs=5e-5)


@pytest.mark.parametrize("curve", SIGMA_SCHEDULES)
def test_curves_span_the_schedule_and_tell_times_that_fit(curve):
    grid = make_host_grid(SD, "euler", 20, spacing=curve)
    ratio = grid.sigma / grid.alpha
    assert ratio[0] == pytest.approx(SD.sigma_edm[-1], rel=1e-12)
    assert ratio[-2] == pytest.approx(SD.sigma_edm[0], rel=1e-12)
    assert ratio[-1] == 0
    told = np.exp(np.interp(grid.t[:-1], np.arange(1000), np.log(SD.sigma_edm)))
    np.testing.assert_allclose(told, ratio[:-1], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "spacing", "steps"), list(itertools.product(SAMPLERS, SPACINGS, [1, 2, 7, 50]))
)
@pytest.mark.parametrize("schedule", [SD, ZERO], ids=["sd", "zero"])
def test_every_grid_keeps_the_contract(schedule, name, spacing, steps):
    convention = convention_of(name)
    grid = make_host_grid(schedule, name, steps, options=SD_OPTIONS, spacing=spacing)
    assert grid.t.shape == grid.alpha.shape == grid.sigma.shape == (steps + 1,)
    np.testing.assert_allclose(grid.alpha**2 + grid.sigma**2, 1, rtol=1e-15)
    assert np.all(np.diff(grid.alpha[:-1]) > 0)
    # Only a last step from the first level to the first level goes nowhere.
    assert grid.alpha[-1] >= grid.alpha[-2]
    assert np.all((grid.t >= 0) & (grid.t <= 999))
    if convention.integer_timesteps and (spacing in TIMESTEP_SPACINGS or convention.in_sigma_space):
        np.testing.assert_array_equal(grid.t, np.round(grid.t))
    assert 0 < grid.init_noise_sigma <= 1


def test_between_two_levels_the_ratio_is_interpolated():
    ratio = SD.sigma_edm
    np.testing.assert_allclose(interpolate(ratio, np.array([0.0, 500.0])), ratio[[0, 500]])
    assert interpolate(ratio, np.array([41.5])) == pytest.approx((ratio[41] + ratio[42]) / 2)


def test_where_samplers_land():
    first, one = SchedulerOptions(set_alpha_to_one=False), SchedulerOptions(set_alpha_to_one=True)
    final = {
        name: [
            make_host_grid(SD, name, 10, options=options).sigma[-1]
            for options in (one, first, SchedulerOptions(final_sigmas_type="sigma_min"))
        ]
        for name in ("ddpm", "ddim", "pndm", "euler", "dpmpp-2m")
    }
    low = pytest.approx(SD.sigma[0])
    assert final == {
        "ddpm": [0, 0, 0],
        "ddim": [0, low, 0],
        "pndm": [0, low, low],  # which it does, too, where nothing is said
        "euler": [0, 0, low],
        "dpmpp-2m": [0, 0, low],
    }


def test_zero_terminal_snr_is_finite_only_for_solvers_in_ratios():
    first = {name: make_host_grid(ZERO, name, 10, spacing="trailing").alpha[0] for name in SAMPLERS}
    assert first["ddpm"] == first["ddim"] == 0
    assert first["euler"] == first["dpmpp-2m"] == pytest.approx(2.0**-12)
    assert pytest.approx(4096, rel=1e-6) == MAX_SIGMA


def test_the_start_is_below_one_for_euler_unless_leading():
    starts = [
        make_host_grid(SD, "euler", 10, spacing=s).init_noise_sigma
        for s in ("linspace", "trailing", "leading")
    ]
    assert starts == [pytest.approx(SD.sigma[-1])] * 2 + [1.0]


def test_options_of_a_checkpoint_and_the_users_choice():
    options = SchedulerOptions.from_config(
        {
            "_class_name": "EulerDiscreteScheduler",
            "timestep_spacing": "leading",
            "use_karras_sigmas": True,
            "steps_offset": 1,
            "clip_sample": False,
            "skip_prk_steps": True,
        }
    )
    assert options == SchedulerOptions(
        timestep_spacing="leading", sigma_schedule="karras", steps_offset=1
    )
    curve = make_host_grid(SD, "euler", 10, options=options)
    assert curve.sigma[0] / curve.alpha[0] == pytest.approx(SD.sigma_edm[901])
    chosen = make_host_grid(SD, "euler", 10, options=options, spacing="trailing")
    np.testing.assert_array_equal(chosen.t[:-1], np.arange(999, 0, -100))
    # DDIM knows no curves: those of the checkpoint were not meant for it.
    ddim = make_host_grid(SD, "ddim", 10, options=options)
    np.testing.assert_array_equal(ddim.t[:-1], np.arange(901, 0, -100))


@pytest.mark.parametrize(
    "config",
    [
        {"use_lu_lambdas": True},
        {"timestep_type": "continuous"},
        {"timestep_spacing": "leaping"},
        {"final_sigmas_type": "one"},
    ],
)
def test_unsupported_options_are_named(config):
    with pytest.raises(InputError, match=next(iter(config))):
        SchedulerOptions.from_config(config)


@pytest.mark.parametrize(
    ("spacing", "steps", "options"),
    [
        ("leading", 1000, SD_OPTIONS),
        ("linspace", 1001, SchedulerOptions()),
        ("linspace", 0, SchedulerOptions()),
    ],
)
def test_too_many_or_no_steps(spacing, steps, options):
    with pytest.raises(InputError, match=f"steps: got {steps}"):
        times(spacing, steps, options)


def test_unknown_spacing():
    with pytest.raises(InputError, match=r"timestep_spacing: got 'karas'.*'karras'"):
        times("karas", 10)


def test_a_padded_grid_has_one_shape_for_any_number_of_steps():
    grids = [make_grid(SD, "ddim", steps, prediction_type="epsilon") for steps in (1, 20, 500)]
    assert {g.t.shape for g in grids} == {(1, 1001)}
    assert [g.num_steps.item() for g in grids] == [1, 20, 500]
    assert {leaf.dtype for g in grids for leaf in g} == {jnp.dtype("float32"), jnp.dtype("int32")}
    level = grids[1].level(jnp.array([20]), 4)
    assert level.alpha.shape == (1, 1, 1, 1)
    assert (level.alpha.item(), level.sigma.item()) == (1, 0)


def test_epsilon_cannot_start_where_nothing_is_left():
    for spacing in TIMESTEP_SPACINGS:
        make_grid(ZERO, "ddim", 10, prediction_type="v_prediction", spacing=spacing)
    make_grid(ZERO, "euler", 10, prediction_type="epsilon", spacing="trailing")
    with pytest.raises(InputError, match="prediction_type: got 'epsilon' with a zero"):
        make_grid(ZERO, "ddim", 10, prediction_type="epsilon", spacing="trailing")


def test_unknown_sampler():
    with pytest.raises(InputError, match=r"sampler: got 'dpmpp_2m'.*'dpmpp-2m'"):
        make_grid(SD, "dpmpp_2m", 10, prediction_type="epsilon")


def test_the_sampler_of_a_checkpoint():
    assert sampler_name({"_class_name": "DDIMScheduler"}) == "ddim"
    assert sampler_name({"_class_name": "FlaxPNDMScheduler"}) == "pndm:skip_prk_steps=false"
    assert sampler_name({"_class_name": "PNDMScheduler", "skip_prk_steps": True}) == "pndm"
    solver = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2}
    assert sampler_name(solver) == "dpmpp-2m"
    with pytest.raises(InputError, match="solver_order: got 3"):
        sampler_name(solver | {"solver_order": 3})
    noisy = solver | {"algorithm_type": "sde-dpmsolver++"}
    assert sampler_name(noisy) == "dpmpp-2m-sde"
    assert sampler_name(noisy | {"solver_order": 3}) == "dpmpp-3m-sde"
    with pytest.raises(InputError, match="solver_order: got 1"):
        sampler_name(noisy | {"solver_order": 1})
    with pytest.raises(InputError, match="algorithm_type: got 'dpmsolver'"):
        sampler_name(solver | {"algorithm_type": "dpmsolver"})
    with pytest.raises(InputError, match="_class_name: got 'SASolverScheduler'"):
        sampler_name({"_class_name": "SASolverScheduler"})


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_has_a_sampler_and_refuses_other_options(scheduler):
    config = {"_class_name": scheduler}
    get_sampler(sampler_name(config))
    for name, options in SCHEDULERS[scheduler].items():
        own = config | {key: values[0] for key, values in options.items()}
        assert sampler_name(own) == name
        for key in options:
            with pytest.raises(InputError, match=f"{key}: got 'odd', expected"):
                sampler_name(own | {key: "odd"})


def test_a_grid_is_its_layout_in_float32():
    levels = make_host_grid(SD, PLAIN, 5)
    grid = TimestepGrid.from_host(levels)
    for mine, exact in zip(grid[:3], levels[:3], strict=True):
        np.testing.assert_array_equal(mine[0], exact.astype(np.float32))


def test_a_flow_is_shifted_and_starts_from_pure_noise():
    flow = FlowSchedule(shift=3.0)
    grid = make_host_grid(flow, "euler", 4, spacing="trailing")
    s = np.array([1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(grid.t, 1000 * 3 * s / (1 + 2 * s), rtol=1e-14)
    np.testing.assert_allclose(grid.alpha + grid.sigma, 1, rtol=1e-15)
    assert (grid.alpha[0], grid.sigma[0], grid.init_noise_sigma) == (0, 1, 1.0)
    last = 3 * 0.001 / (1 + 2 * 0.001)  # shifted, and then once more
    linspace = make_host_grid(flow, "heun", 5)
    assert linspace.t[-2] == pytest.approx(1000 * 3 * last / (1 + 2 * last), rel=1e-12)
    traced = make_grid(flow, "euler", 4, prediction_type="flow_prediction")
    assert traced.t.shape == (1, 1001)
    with pytest.raises(InputError, match="timestep_spacing: got 'leading'"):
        make_host_grid(flow, "euler", 4, spacing="leading")
    with pytest.raises(InputError, match="prediction_type: got 'epsilon'"):
        make_grid(flow, "euler", 4, prediction_type="epsilon")


def test_a_flow_is_shifted_by_the_resolution():
    options = SchedulerOptions(use_dynamic_shifting=True)
    grid = make_host_grid(FlowSchedule(), "euler", 2, options=options, num_tokens=256)
    # exp(mu) / (exp(mu) + 1 / s - 1) at s = 1/2, mu = 0.5
    np.testing.assert_allclose(grid.sigma, [1, np.exp(0.5) / (np.exp(0.5) + 1), 0], rtol=1e-14)
    with pytest.raises(InputError, match="num_tokens: got none"):
        make_host_grid(FlowSchedule(), "euler", 2, options=options)


def test_the_levels_of_edm():
    edm = EDMSchedule()
    grid = make_host_grid(edm, "heun", 18)
    noise = 0.5 * grid.sigma / grid.alpha
    np.testing.assert_allclose(noise[:-1], karras(80.0, 0.002, 18), rtol=1e-12)
    np.testing.assert_allclose(grid.t[:-1], np.log(noise[:-1]) / 4, rtol=1e-12)
    assert (grid.alpha[-1], grid.sigma[-1]) == (1, 0)


def test_the_schedule_of_a_checkpoint():
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert schedule_of(flow) == FlowSchedule(shift=3.0)
    assert prediction_type_of(flow) == "flow_prediction"
    assert sampler_name(flow) == "euler"
    assert schedule_of({"_class_name": "DDIMScheduler"}) == VPSchedule()
    assert prediction_type_of({}) == "epsilon"
    with pytest.raises(InputError, match="invert_sigmas: got True"):
        SchedulerOptions.from_config({"invert_sigmas": True})
