"""Where diffusers' schedulers are far from the solution, and how near jaxdiff's samplers are.

PYTHONPATH=. JAX_PLATFORMS=cpu PYTHON_WITH_DIFFUSERS tests/parity/scheduler_errors.py     # seconds

The network is the exact denoiser of Gaussian data, for which the probability-flow ODE has a closed
form in float64: x / alpha - M grows as sqrt(C + r^2), r = sigma / alpha. Errors are relative to the
largest latent. What is said of rounding is compared with the same step in float64.
"""

import functools
from typing import Any

import diffusers
import jax.numpy as jnp
import numpy as np
import torch

from jaxdiff.checkpoints.schedulers import SchedulerOptions, vp_schedule
from jaxdiff.checkpoints.timestep_grids import make_grid, make_host_grid
from jaxdiff.core.types import NDArray
from jaxdiff.diffusion.denoising import Prediction, per_image
from jaxdiff.samplers.base import get_sampler, init_state, per_sample_keys, run_steps
from jaxdiff.samplers.steps import sigma_ratio

M, C = 0.7, 0.25  # mean and variance of the data
CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "skip_prk_steps": True,
    "timestep_spacing": "leading",
}
SCHEDULE = vp_schedule(CONFIG)
NOISE = np.random.default_rng(0).standard_normal((1, 8))


def epsilon(x: Any, alpha: Any, sigma: Any) -> Any:
    """The noise that the exact denoiser finds in x."""
    D = M + alpha * C / (alpha**2 * C + sigma**2) * (x - alpha * M)
    return (x - alpha * D) / sigma


def tanh_epsilon(x: Any, alpha: Any, sigma: Any) -> Any:
    """The noise that a denoiser of values -1 and 1 would find, whose image does not follow x."""
    D = torch.tanh(x) if isinstance(x, torch.Tensor) else jnp.tanh(x)
    return (x - alpha * D) / sigma


def exact(x: NDArray, r: float, r_end: float) -> NDArray:
    """x / alpha at the ratio `r_end` of the ODE's solution from x / alpha at r."""
    return M + (x - M) * np.sqrt((C + r_end**2) / (C + r**2))


def level(t: float) -> tuple[float, float]:
    """(alpha, sigma) at a time, between two levels linear in log sigma / alpha."""
    ratio = np.exp(np.interp(t, np.arange(1000), np.log(SCHEDULE.sigma_edm)))
    return 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)


def theirs(scheduler: Any, timesteps: Any, x: NDArray, network: Any = epsilon) -> NDArray:
    """What a scheduler makes of x in the evaluations at `timesteps`, as its pipelines call it."""
    latents = torch.from_numpy(x)
    for t in timesteps:
        seen = scheduler.scale_model_input(latents, t)
        latents = scheduler.step(network(seen, *level(float(t))), t, latents).prev_sample
    return latents.numpy()


def ours(
    name: str,
    steps: int,
    x: NDArray,
    first: int = 0,
    spacing: str | None = None,
    network: Any = epsilon,
) -> NDArray:
    """x / alpha after all steps of a sampler from `first` on, from x, in float32."""
    options = SchedulerOptions.from_config(CONFIG)
    make = functools.partial(make_grid, SCHEDULE, name, steps, prediction_type="epsilon")
    grid = make(options=options, spacing=spacing)._replace(first=jnp.asarray([first]))

    def denoise(x: Any, here: Any, state: Any) -> Any:
        eps = network(x, here.alpha, here.sigma)
        return Prediction((x - here.sigma * eps) / here.alpha, eps), state

    sampler = get_sampler(name).for_schedule(SCHEDULE)
    state = init_state(jnp.asarray(x, jnp.float32), sampler=sampler)
    ends = jnp.int32(0), jnp.int32(steps - first)
    state = run_steps(denoise, state, grid, per_sample_keys((0,)), *ends, sampler=sampler)
    return np.asarray(state.x / per_image(grid.alpha[:, steps], state.x), np.float64)


def report(what: str, theirs: NDArray, ours: NDArray, solution: NDArray) -> None:
    """One line: both errors."""
    errors = (np.abs(each - solution).max() / np.abs(solution).max() for each in (theirs, ours))
    print(f"{what:60}" + "".join(f"{error:12.1e}" for error in errors))


def pndm_image_to_image(steps: int) -> None:
    """The second half of the times, from the exact distribution at the first of them."""
    scheduler = diffusers.PNDMScheduler.from_config(CONFIG)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps[steps // 2 :]  # as the pipeline cuts them
    host = make_host_grid(SCHEDULE, "pndm", steps, options=SchedulerOptions.from_config(CONFIG))
    first = int(np.flatnonzero(host.t == int(times[0]))[0])
    alpha, sigma = host.alpha[first], host.sigma[first]
    x = alpha * M + np.sqrt(alpha**2 * C + sigma**2) * NOISE
    solution = exact(x / alpha, sigma / alpha, host.sigma[-1] / host.alpha[-1])
    got = theirs(scheduler, times, x) / host.alpha[-1]
    name = f"pndm, image to image, {steps - first} of {steps} steps"
    report(name, got, ours("pndm", steps, x, first), solution)


def heun_handed_over(steps: int) -> None:
    """Base and refiner are the same network; the second has the times below 400."""
    base, refiner = (diffusers.HeunDiscreteScheduler.from_config(CONFIG) for _ in range(2))
    base.set_timesteps(steps)
    refiner.set_timesteps(steps)
    options = SchedulerOptions.from_config(CONFIG)
    host = make_host_grid(SCHEDULE, "heun", steps, options=options)
    x = host.alpha[0] * M + np.sqrt(host.alpha[0] ** 2 * C + host.sigma[0] ** 2) * NOISE
    cut, times = 400, base.timesteps
    middle = theirs(base, times[times >= cut], x / host.alpha[0])
    left = int((times < cut).sum())
    begin = len(times) - left - (left + 1) % 2  # an odd number, says the pipeline
    refiner.set_begin_index(begin)
    got = theirs(refiner, times[begin:], middle)
    solution = exact(x / host.alpha[0], host.sigma[0] / host.alpha[0], 0)
    report(f"heun, base then refiner, {steps} steps", got, ours("heun", steps, x), solution)


def heun_in_two_steps() -> None:
    """As the pipeline runs it, in float32, against the same two steps in float64."""
    config = CONFIG | {"timestep_spacing": "linspace"}
    exactly, plain = (diffusers.HeunDiscreteScheduler.from_config(config) for _ in range(2))
    exactly.alphas_cumprod = torch.from_numpy(SCHEDULE.alphas_cumprod)
    for scheduler in (exactly, plain):
        scheduler.set_timesteps(2)
    host = make_host_grid(SCHEDULE, "heun", 2, spacing="linspace")
    ratio = host.sigma / host.alpha
    exactly.sigmas = torch.from_numpy(ratio[[0, 1, 1, 2]])
    x = host.alpha[0] * M + np.sqrt(host.alpha[0] ** 2 * C + host.sigma[0] ** 2) * NOISE
    solution = theirs(exactly, exactly.timesteps, x / host.alpha[0], tanh_epsilon)
    got = theirs(plain, plain.timesteps, (x / host.alpha[0]).astype(np.float32), tanh_epsilon)
    mine = ours("heun", 2, x, spacing="linspace", network=tanh_epsilon)
    report("heun in 2 steps", got, mine, solution)


def way_down_of_kdpm2_ancestral(steps: int) -> None:
    """The level r'^2 / r that the first step goes down to, with linspace, its default."""
    config = CONFIG | {"timestep_spacing": "linspace"}
    scheduler = diffusers.KDPM2AncestralDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    options = SchedulerOptions.from_config(config)
    place = (SCHEDULE, "kdpm2-ancestral", steps)
    grid = make_grid(*place, prediction_type="epsilon", options=options)
    here, there = (grid.level(jnp.asarray([i]), 1) for i in (0, 1))
    down = np.asarray(sigma_ratio(here, there) * there.sigma / there.alpha, np.float64)
    host = make_host_grid(*place, options=options)
    r, r_next = host.sigma[:2] / host.alpha[:2]
    name = f"kdpm2-ancestral, way down in the first of {steps} steps"
    report(name, scheduler.sigmas_down[:1].numpy(), down, r_next**2 / r)


def first_time_of_exponential_sigmas() -> None:
    """The first time that the network is asked at: that of the noisiest level is 999."""
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        CONFIG | {"use_exponential_sigmas": True}
    )
    scheduler.set_timesteps(20)
    host = make_host_grid(SCHEDULE, "dpmpp-2m", 20, spacing="exponential")
    first = int(scheduler.timesteps[0]), host.t[0]
    print(f"{'first time of exponential sigmas (right: 999)':60}{first[0]:12}{first[1]:12.0f}")


if __name__ == "__main__":
    print(f"{'relative error':60}{'diffusers':>12}{'jaxdiff':>12}")
    for n in (20, 40):
        pndm_image_to_image(n)
    for n in (20, 40):
        heun_handed_over(n)
    heun_in_two_steps()
    for n in (2, 4):
        way_down_of_kdpm2_ancestral(n)
    first_time_of_exponential_sigmas()
