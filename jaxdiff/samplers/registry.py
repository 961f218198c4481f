"""The samplers by name, and their grids for the scheduler configs of checkpoints."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.diffusion.schedules import NoiseSchedule
from jaxdiff.diffusion.timesteps import SchedulerOptions, TimestepGrid, make_timestep_grid
from jaxdiff.samplers.base import Sampler
from jaxdiff.samplers.ddim import DDIM
from jaxdiff.samplers.ddpm import DDPM
from jaxdiff.samplers.dpmpp_2m import DPMpp2M
from jaxdiff.samplers.dpmpp_2s import DPMpp2S
from jaxdiff.samplers.dpmpp_sde import DPMpp2MSDE, DPMpp3MSDE
from jaxdiff.samplers.euler import Euler, EulerAncestral
from jaxdiff.samplers.heun import Heun
from jaxdiff.samplers.lcm import LCM
from jaxdiff.samplers.pndm import PNDM
from jaxdiff.samplers.unipc import UniPC

SAMPLERS: dict[str, Sampler] = {
    "ddpm": DDPM(),
    "ddim": DDIM(),
    "pndm": PNDM(),
    "euler": Euler(),
    "euler-ancestral": EulerAncestral(),
    "heun": Heun(),
    "dpmpp-2s": DPMpp2S(),
    "dpmpp-2m": DPMpp2M(),
    "dpmpp-2m-sde": DPMpp2MSDE(),
    "dpmpp-3m-sde": DPMpp3MSDE(),
    "unipc": UniPC(),
    "lcm": LCM(),
}

# For classes of diffusers the samplers that they stand for, with the values that options of theirs
# must have. Where one is not given the class takes the first value of the first sampler.
Options = Mapping[str, tuple[Any, ...]]
_MULTISTEP: Options = {
    "solver_type": ("midpoint",),
    "final_sigmas_type": ("zero",),
    "euler_at_final": (False,),
}
SCHEDULERS: dict[str, dict[str, Options]] = {
    "DDPMScheduler": {"ddpm": {"variance_type": ("fixed_small", "fixed_small_log")}},
    "DDIMScheduler": {"ddim": {}},
    "PNDMScheduler": {"pndm": {"skip_prk_steps": (True,)}},
    "EulerDiscreteScheduler": {"euler": {}},
    "EulerAncestralDiscreteScheduler": {"euler-ancestral": {}},
    "HeunDiscreteScheduler": {"heun": {}},
    "DPMSolverSinglestepScheduler": {
        "dpmpp-2s": {
            "algorithm_type": ("dpmsolver++",),
            "solver_order": (2,),
            "solver_type": ("midpoint",),
            "final_sigmas_type": ("zero",),
        }
    },
    "DPMSolverMultistepScheduler": {
        "dpmpp-2m": {"algorithm_type": ("dpmsolver++",), "solver_order": (2,), **_MULTISTEP},
        "dpmpp-2m-sde": {
            "algorithm_type": ("sde-dpmsolver++",),
            "solver_order": (2,),
            **_MULTISTEP,
        },
        "dpmpp-3m-sde": {
            "algorithm_type": ("sde-dpmsolver++",),
            "solver_order": (3,),
            **_MULTISTEP,
        },
    },
    "UniPCMultistepScheduler": {
        "unipc": {
            "solver_order": (2,),
            "solver_type": ("bh2",),
            "predict_x0": (True,),
            "disable_corrector": ([],),
            "solver_p": (None,),
            "lower_order_final": (True,),
            "final_sigmas_type": ("zero",),
        }
    },
    "LCMScheduler": {"lcm": {"timestep_scaling": (10.0,)}},
}


def get_sampler(name: str, eta: float | None = None) -> Sampler:
    """The sampler of that name, with a share `eta` of fresh noise where one is given (0 to 1).

    Raises InputError where it has none to choose.
    """
    rule = SAMPLERS[one_of("sampler", name, SAMPLERS)]
    if eta is None:
        return rule
    if not isinstance(rule, DDIM):
        raise InputError(f"eta: got {eta:g} with sampler {name!r}, expected sampler 'ddim'")
    return dataclasses.replace(rule, eta=eta)


def nfe_per_step(
    name: str, steps: int, *, ends_clean: bool = True, restarts: Sequence[int] = ()
) -> list[int]:
    """The denoiser calls of each of `steps` steps.

    `ends_clean`: the last one ends at sigma 0; `restarts`: the steps that begin another phase.
    """
    counts = [1] * steps
    if isinstance(SAMPLERS[name], Heun):
        counts = [2] * (steps - ends_clean) + [1] * ends_clean
    elif isinstance(SAMPLERS[name], PNDM):
        counts = [2 if i in {0, *restarts} else 1 for i in range(steps)]
    return counts


def sampler_name(config: Mapping[str, Any]) -> str:
    """The sampler that a diffusers scheduler_config.json asks for.

    Raises InputError if there is none; any other can still be chosen by name.
    """
    scheduler = str(config.get("_class_name", "DDIMScheduler")).removeprefix("Flax")
    known = SCHEDULERS[one_of("scheduler_config.json: _class_name", scheduler, SCHEDULERS)]
    default = next(iter(known.values()))
    settings = {key: values[0] for key, values in default.items()} | dict(config)
    refused = {
        name: [key for key, values in options.items() if settings[key] not in values]
        for name, options in known.items()
    }
    name = min(refused, key=lambda name: len(refused[name]))
    for key in refused[name]:
        raise InputError(
            f"scheduler_config.json: {key}: got {settings[key]!r}, expected {known[name][key][0]!r}"
        )
    return name


def make_grid(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    *,
    prediction_type: str,
    spacing: str | None = None,
    options: SchedulerOptions | None = None,
) -> TimestepGrid:
    """The grid of `steps` steps of a sampler, for a network that predicts `prediction_type`.

    `spacing` is the user's choice, `options` what the checkpoint says; where both leave something
    open, diffusers' convention for that sampler decides. Grids of one schedule all have the same
    shape, so that another number of steps compiles nothing. Raises InputError.
    """
    rule = SAMPLERS[one_of("sampler", sampler, SAMPLERS)]
    levels = make_timestep_grid(
        schedule,
        steps,
        convention=rule.convention,
        options=options or SchedulerOptions(),
        spacing=spacing,
    )
    if prediction_type == "epsilon" and levels.alpha[0] == 0:
        raise InputError(
            "prediction_type: got 'epsilon' with a zero-terminal-SNR schedule, "
            "expected 'v_prediction' or 'sample': noise says nothing about the image there"
        )
    return TimestepGrid.from_host(levels, length=schedule.num_timesteps)
