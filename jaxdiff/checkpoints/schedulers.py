"""Scheduler configs of diffusers: the schedule, the sampler, and what decides its noise levels.

Checkpoints and samplers differ only in data: `SchedulerOptions` is what a scheduler_config.json
says, `SchedulerConvention` what diffusers' scheduler of that sampler does where it says nothing.
`timestep_grids` makes the levels of them.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from jaxdiff.checkpoints.config_keys import EDM_KEYS, SCHEDULER_KEYS
from jaxdiff.checkpoints.prediction_type import EDM, FLOW, stored_prediction_type
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.diffusion.denoising import PREDICTION_TYPES
from jaxdiff.diffusion.grids import SIGMA_SCHEDULES, TIMESTEP_SPACINGS
from jaxdiff.diffusion.schedules import EDMSchedule, FlowSchedule, Schedule, VPSchedule

UNCLIP = "UnCLIPScheduler"

# For classes of diffusers the samplers that they stand for, with the values that options of theirs
# must have. Where one is not given the class takes the first value of the first sampler.
Options = Mapping[str, tuple[Any, ...]]
_MULTISTEP: Options = {
    "solver_type": ("midpoint",),
    "final_sigmas_type": ("zero",),
    "euler_at_final": (False,),
}
SCHEDULERS: dict[str, dict[str, Options]] = {
    "DDPMScheduler": {
        "ddpm": {"variance_type": ("fixed_small", "fixed_small_log")},
        "ddpm:variance=fixed_large": {"variance_type": ("fixed_large",)},
        "ddpm:variance=learned_range": {"variance_type": ("learned_range",)},
        "ddpm:variance=learned": {"variance_type": ("learned",)},
    },
    UNCLIP: {
        "ddpm": {"variance_type": ("fixed_small_log",)},
        "ddpm:variance=learned_range": {"variance_type": ("learned_range",)},
    },
    "DDIMScheduler": {"ddim": {}},
    "PNDMScheduler": {
        "pndm:skip_prk_steps=false": {"skip_prk_steps": (False,)},
        "pndm": {"skip_prk_steps": (True,)},
    },
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
    "LMSDiscreteScheduler": {"lms": {}},
    "KDPM2DiscreteScheduler": {"kdpm2": {}},
    "KDPM2AncestralDiscreteScheduler": {"kdpm2-ancestral": {}},
    "DEISMultistepScheduler": {"deis": {"solver_order": (2,), "lower_order_final": (True,)}},
    "LCMScheduler": {"lcm": {"timestep_scaling": (10.0,)}},
    "TCDScheduler": {"tcd": {}},
    FLOW: {"euler": {}},
    "EDMEulerScheduler": {"euler": {}},
    "EDMDPMSolverMultistepScheduler": {
        "dpmpp-2m": {"algorithm_type": ("dpmsolver++",), "solver_order": (2,), **_MULTISTEP},
        "dpmpp-2m-sde": {
            "algorithm_type": ("sde-dpmsolver++",),
            "solver_order": (2,),
            **_MULTISTEP,
        },
    },
}


# Defaults of schedules in diffusers' classes that are not those of VPSchedule.
_HEUN = {"beta_start": 0.00085, "beta_end": 0.012}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "HeunDiscreteScheduler": _HEUN,
    "KDPM2DiscreteScheduler": _HEUN,
    "KDPM2AncestralDiscreteScheduler": _HEUN,
    "LCMScheduler": {**_HEUN, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**_HEUN, "beta_schedule": "scaled_linear"},
    UNCLIP: {"beta_schedule": "squaredcos_cap_v2"},
}
# Classes whose samplers clip the image of every step to [-1, 1] in diffusers, and whether they do
# where `clip_sample` is missing.
CLIPS_BY_DEFAULT = {
    "DDPMScheduler": True,
    UNCLIP: True,
    "DDIMScheduler": True,
    "HeunDiscreteScheduler": False,
    "LCMScheduler": False,
}
# Pipelines of diffusers that set `steps_offset` to 1 and `clip_sample` to false, whatever the
# scheduler config says.
CORRECTING_PIPELINES = tuple(
    f"StableDiffusion{task}Pipeline" for task in ("", "Img2Img", "Inpaint")
)
# Those, by how their names begin, that place the timesteps of flows at n/n ... 1/n.
TRAILING_PIPELINES = ("Flux", "Chroma")


def scheduler_class(config: Mapping[str, Any]) -> str:
    """The class that a scheduler_config.json names, without the prefix of former Flax classes."""
    return str(config.get("_class_name", "DDIMScheduler")).removeprefix("Flax")


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The noise schedule of a diffusers scheduler_config.json, whatever class wrote it."""
    name = scheduler_class(config)
    if name in EDM:
        names = {field.name for field in dataclasses.fields(EDMSchedule)}
        return EDMSchedule(**{k: float(v) for k, v in config.items() if k in names})
    if name != FLOW:
        return vp_schedule(config)
    scale = config.get("num_train_timesteps", 1000)
    return FlowSchedule(time_scale=float(scale), shift=float(config.get("shift", 1.0)))


def vp_schedule(config: Mapping[str, Any]) -> VPSchedule:
    """The discrete schedule of a scheduler_config.json.

    Keys that it lacks have the defaults of the class that it names.
    """
    names = {f.name for f in dataclasses.fields(VPSchedule)}
    given = {k: v for k, v in config.items() if k in names and v is not None}
    values = CLASS_DEFAULTS.get(scheduler_class(config), {}) | given
    if "trained_betas" in values:
        values["trained_betas"] = tuple(float(beta) for beta in values["trained_betas"])
    if "rescale_betas_zero_snr" in config:
        values["zero_terminal_snr"] = bool(config["rescale_betas_zero_snr"])
    return VPSchedule(**values)


def vp_schedule_config(schedule: VPSchedule) -> dict[str, Any]:
    """The keys of scheduler_config.json for a schedule, as `vp_schedule` reads them."""
    config = dataclasses.asdict(schedule)
    config["rescale_betas_zero_snr"] = config.pop("zero_terminal_snr")
    if config["beta_schedule"] == "cosine":
        config["beta_schedule"] = "squaredcos_cap_v2"
    if schedule.trained_betas is not None:
        config["trained_betas"] = list(schedule.trained_betas)
    return config


def flow_schedule_config(schedule: FlowSchedule) -> dict[str, Any]:
    """The keys for a flow, as `schedule_of` reads them; InputError for paths they have none of."""
    one_of("path", schedule.path, ("linear",))
    scale = round(schedule.time_scale)
    return {"_class_name": FLOW, "num_train_timesteps": scale, "shift": schedule.shift}


def unclip_scheduler_config(schedule: Schedule, prediction_type: str) -> dict[str, Any]:
    """The scheduler_config.json of a prior; InputError for what UnCLIPScheduler has not.

    The image of each step is clipped to the range of Karlo's and Kandinsky's normalised embeddings.
    """
    one_of("objective.prediction_type", prediction_type, ("sample", "epsilon"))
    if not isinstance(schedule, VPSchedule) or schedule != VPSchedule(
        beta_schedule="squaredcos_cap_v2", num_train_timesteps=schedule.num_train_timesteps
    ):
        raise InputError(
            f"objective.schedule: got {schedule} for a prior, expected "
            "VPSchedule(beta_schedule=squaredcos_cap_v2), as diffusers' UnCLIPScheduler has"
        )
    return {
        "_class_name": UNCLIP,
        "prediction_type": prediction_type,
        "num_train_timesteps": schedule.num_train_timesteps,
        "variance_type": "fixed_small_log",
        "clip_sample": True,
        "clip_sample_range": 5.0,
    }


def prediction_type_of(config: Mapping[str, Any]) -> str:
    """What the network of a diffusers scheduler_config.json predicts; InputError if unknown."""
    name = stored_prediction_type(config)
    return one_of("scheduler_config.json: prediction_type", name, PREDICTION_TYPES)


def sampler_name(config: Mapping[str, Any]) -> str:
    """The sampler that a diffusers scheduler_config.json asks for.

    Raises InputError if there is none; any other can still be chosen by name.
    """
    scheduler = scheduler_class(config)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConvention:
    """How a family of samplers places its levels where a checkpoint leaves it open."""

    spacing: str = "leading"  # the default spacing of times, in TIMESTEP_SPACINGS or "lcm"
    fixed_spacing: bool = False  # whatever a checkpoint says
    extra_points: int = (
        0  # points that leading and linspace place beyond the steps, at the clean end
    )
    integer_timesteps: bool = True  # the network only sees the timesteps of training
    rounds_karras: bool = False  # the times of karras sigmas are whole ones ...
    rounds_karras_of_cosine: bool = True  # ... of cosine schedules too
    final_sigma: str = "zero"  # "zero", "sigma_min", or the name of the option that decides
    set_alpha_to_one_default: bool = True  # the default of the option set_alpha_to_one
    clips_lambda: bool = False  # lambda_min_clipped counts
    in_sigma_space: bool = False  # sigmas must be finite; a checkpoint's sigma schedule applies
    sigma_range_from_timesteps: bool = False  # a sigma schedule spans those of the timesteps
    # diffusers carries x / alpha: linspace and trailing start from sigma * noise, not noise, and
    # latents that others get, or give for the rest of the way, are x / alpha
    carries_x_over_alpha: bool = False


_SIGMAS = SchedulerConvention(
    spacing="linspace",
    integer_timesteps=False,
    final_sigma="final_sigmas_type",
    in_sigma_space=True,
    sigma_range_from_timesteps=True,
    carries_x_over_alpha=True,
)
_DPM_SOLVER = SchedulerConvention(
    spacing="linspace",
    extra_points=1,
    final_sigma="final_sigmas_type",
    in_sigma_space=True,
    rounds_karras=True,
)
# Those of samplers that are not here are the defaults.
CONVENTIONS: dict[str, SchedulerConvention] = {
    "ddim": SchedulerConvention(final_sigma="set_alpha_to_one"),
    "pndm": SchedulerConvention(final_sigma="set_alpha_to_one", set_alpha_to_one_default=False),
    "euler": _SIGMAS,
    "euler-ancestral": dataclasses.replace(_SIGMAS, final_sigma="zero"),
    **dict.fromkeys(("heun", "lms"), dataclasses.replace(_SIGMAS, final_sigma="zero")),
    **dict.fromkeys(
        ("kdpm2", "kdpm2-ancestral"),
        dataclasses.replace(_SIGMAS, final_sigma="zero", rounds_karras=True),
    ),
    "dpmpp-2s": dataclasses.replace(_DPM_SOLVER, fixed_spacing=True, clips_lambda=True),
    **dict.fromkeys(
        ("dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m-sde"),
        dataclasses.replace(_DPM_SOLVER, clips_lambda=True, rounds_karras_of_cosine=False),
    ),
    "unipc": _DPM_SOLVER,
    "deis": dataclasses.replace(_DPM_SOLVER, final_sigma="sigma_min"),
    "lcm": SchedulerConvention(spacing="lcm", fixed_spacing=True),
    "tcd": SchedulerConvention(spacing="lcm", fixed_spacing=True, final_sigma="sigma_min"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """The options of a diffusers scheduler_config.json that decide the timesteps, by its names."""

    timestep_spacing: str | None = None  # None: the convention of the sampler
    sigma_schedule: str | None = None  # in SIGMA_SCHEDULES; diffusers: use_karras_sigmas
    steps_offset: int = 0  # added to leading times
    lambda_min_clipped: float = (
        -math.inf
    )  # DPM-Solver visits no level of a lower log(alpha / sigma)
    set_alpha_to_one: bool | None = None  # land on the clean image, False: on the first level
    final_sigmas_type: str = "zero"  # the same choice for others: "zero" or "sigma_min"
    original_inference_steps: int = 50  # steps of the teacher that a model was distilled from
    # of flows
    use_dynamic_shifting: bool = False  # a shift by the number of tokens of an image
    time_shift_type: str = "exponential"  # of which this is the logarithm, or "linear"
    base_image_seq_len: int = 256  # at this many tokens ...
    base_shift: float = 0.5  # ... it is this
    max_image_seq_len: int = 4096
    max_shift: float = 1.15
    shift_terminal: float | None = None  # the noise of the last level but one, by stretching

    def __post_init__(self) -> None:
        if self.timestep_spacing is not None:
            one_of("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.sigma_schedule is not None:
            one_of("sigma_schedule", self.sigma_schedule, SIGMA_SCHEDULES)
        in_range("steps_offset", self.steps_offset, 0, 1000)
        in_range("lambda_min_clipped", self.lambda_min_clipped, -math.inf, 0)
        one_of("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        in_range("original_inference_steps", self.original_inference_steps, 1, 1000)
        one_of("time_shift_type", self.time_shift_type, ("exponential", "linear"))
        if self.shift_terminal is not None:
            in_range("shift_terminal", self.shift_terminal, 0, 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], pipeline_class: str = "") -> "SchedulerOptions":
        """Options from scheduler_config.json in a folder of `pipeline_class`.

        Raises InputError where it asks for what is not here. Keys of other scheduler classes are
        common in these files and are passed over.
        """
        for key, effect in SCHEDULER_KEYS.items():
            if key in EDM_KEYS and scheduler_class(config) in EDM:
                continue
            if effect.accepted and key in config and config[key] not in effect.accepted:
                raise InputError(
                    f"scheduler_config.json: {key}: got {config[key]!r}, "
                    f"expected {effect.accepted[0]!r}"
                )
        names = {f.name for f in dataclasses.fields(cls)} - {"sigma_schedule"}
        values = {k: v for k, v in config.items() if k in names and v is not None}
        if pipeline_class.startswith(TRAILING_PIPELINES):
            values["timestep_spacing"] = "trailing"
        if scheduler_class(config) == UNCLIP:
            values["timestep_spacing"] = "linspace"
        if pipeline_class in CORRECTING_PIPELINES:
            values["steps_offset"] = 1
        curves = [name for name in SIGMA_SCHEDULES if config.get(f"use_{name}_sigmas")]
        own = config.get("sigma_schedule") if scheduler_class(config) in EDM else None
        return cls(sigma_schedule=curves[0] if curves else own, **values)


def clipping_of(config: Mapping[str, Any], *, pixels: bool, pipeline_class: str = "") -> str | None:
    """The guidance wrapper that clips the image of each step as diffusers' scheduler does.

    None where it does not. Latents are only clipped by thresholding: a warning says so where the
    scheduler of a pipeline of this class would. InputError for values out of range.
    """
    if config.get("thresholding"):
        names = {"percentile": "dynamic_thresholding_ratio", "max_limit": "sample_max_value"}
        values = {"percentile": 0.995, "max_limit": 1.0}
        values |= {name: config[key] for name, key in names.items() if key in config}
        return "threshold:" + ",".join(f"{name}={value}" for name, value in values.items())
    default = CLIPS_BY_DEFAULT.get(scheduler_class(config))
    if default is None or not config.get("clip_sample", default):
        return None
    if pixels:
        return f"clip-sample:limit={config.get('clip_sample_range', 1.0)}"
    if pipeline_class and pipeline_class not in CORRECTING_PIPELINES:
        warnings.warn(
            "scheduler_config.json: clip_sample is true, with which diffusers clips latents to "
            "[-1, 1] in every step: it has no effect here",
            stacklevel=2,
        )
    return None
