"""The samplers by name, and their grids for the scheduler configs of checkpoints."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.diffusion.schedules import NoiseSchedule
from jaxdiff.diffusion.timesteps import Grid, GridOptions, layout
from jaxdiff.samplers.ddim import DDIM
from jaxdiff.samplers.ddpm import DDPM
from jaxdiff.samplers.dpmpp_2m import DPMpp2M
from jaxdiff.samplers.euler import Euler, EulerAncestral
from jaxdiff.samplers.pndm import PNDM
from jaxdiff.samplers.rule import Sampler

SAMPLERS: dict[str, Sampler] = {
    "ddpm": DDPM(),
    "ddim": DDIM(),
    "pndm": PNDM(),
    "euler": Euler(),
    "euler-ancestral": EulerAncestral(),
    "dpmpp-2m": DPMpp2M(),
}

# Classes of diffusers, and the values of their options that the sampler of that name stands for.
SCHEDULERS: dict[str, tuple[str, dict[str, tuple[Any, ...]]]] = {
    "DDPMScheduler": ("ddpm", {"variance_type": ("fixed_small", "fixed_small_log")}),
    "DDIMScheduler": ("ddim", {}),
    "PNDMScheduler": ("pndm", {"skip_prk_steps": (True,)}),
    "EulerDiscreteScheduler": ("euler", {}),
    "EulerAncestralDiscreteScheduler": ("euler-ancestral", {}),
    "DPMSolverMultistepScheduler": (
        "dpmpp-2m",
        {
            "algorithm_type": ("dpmsolver++",),
            "solver_order": (2,),
            "solver_type": ("midpoint",),
            "final_sigmas_type": ("zero",),
            "euler_at_final": (False,),
        },
    ),
}


def sampler_name(config: Mapping[str, Any]) -> str:
    """The sampler that a diffusers scheduler_config.json asks for.

    Raises InputError if there is none; any other can still be chosen by name.
    """
    scheduler = str(config.get("_class_name", "DDIMScheduler")).removeprefix("Flax")
    name, options = SCHEDULERS[one_of("scheduler_config.json: _class_name", scheduler, SCHEDULERS)]
    for key, supported in options.items():
        if key in config and config[key] not in supported:
            raise InputError(
                f"scheduler_config.json: {key}: got {config[key]!r}, expected {supported[0]!r}"
            )
    return name


def make_grid(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    *,
    kind: str,
    spacing: str | None = None,
    options: GridOptions | None = None,
) -> Grid:
    """The grid of `steps` steps of a sampler, for a network that predicts `kind`.

    `spacing` is the user's choice, `options` what the checkpoint says; where both leave something
    open, diffusers' convention for that sampler decides. Grids of one schedule all have the same
    shape, so that another number of steps compiles nothing. Raises InputError.
    """
    rule = SAMPLERS[one_of("sampler", sampler, SAMPLERS)]
    levels = layout(
        schedule,
        steps,
        convention=rule.convention,
        options=options or GridOptions(),
        spacing=spacing,
    )
    if kind == "epsilon" and levels.alpha[0] == 0:
        raise InputError(
            "prediction_type: got 'epsilon' with a zero-terminal-SNR schedule, "
            "expected 'v_prediction' or 'sample': noise says nothing about the image there"
        )
    return Grid.of(levels, length=schedule.levels)
