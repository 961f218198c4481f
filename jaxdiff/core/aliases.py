"""Other names that work: former ones, of options, arguments, rules and stored settings; diffusers'.

Those of training configs are in `training.config`. Two names of one thing together are an error
that names both.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of

P = ParamSpec("P")
T = TypeVar("T")

# Options of each command; `no-` in front of a name inverts a flag.
_SPACING = {"timesteps": "timestep-spacing"}
_PLAN = {"largest": "find-max-batch"}
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "generate": {
        "guide": "guidance-model",
        "embedding": "textual-inversion",
        "literal": "no-prompt-syntax",
        **_SPACING,
        **_PLAN,
    },
    "train": {"ema-width": "ema-std", **_PLAN},
    "cache-latents": {"compute": "compute-dtype", "smallest": "min-bucket-size"},
    "export": _SPACING,
    "evaluate": {"every": "prompt-stride", **_SPACING},
    "sweep": {
        "guide": "guidance-model",
        "measured": "evaluate",
        "timed": "measure-speed",
        "every": "prompt-stride",
    },
    "strip": {"at": "show-steps", **_SPACING},
}

# Arguments of a pipeline and of `hires_fix`: former names, and those of diffusers' pipelines.
ARGUMENTS: Mapping[str, str] = {
    "timesteps": "timestep_spacing",
    "watch": "intermediate_steps",
    "report": "callback",
    "word": "token",
    "redrawn": "hires_strength",
    "num_inference_steps": "steps",
    "mask_image": "mask",
    "output_type": "output",
    "original_size_as_tuple": "original_size",
    "crops_coords_top_left": "crop_top_left",
    "negative_crops_coords_top_left": "negative_crop_top_left",
    "torch_dtype": "dtype",  # of `load`
}
OUTPUT_FORMS: Mapping[str, str] = {"np": "numpy"}  # forms of the images

# Former names in modules that people import from: the module and the name that they have now.
NAMES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "jaxdiff.diffusion.schedules": {"NoiseSchedule": ("jaxdiff.diffusion.schedules", "VPSchedule")},
    "jaxdiff.samplers": {"make_grid": ("jaxdiff.checkpoints.timestep_grids", "make_grid")},
}

# Guidance rules and wrappers, and options of a rule (under its present name).
GUIDANCE: Mapping[str, str] = {
    "three": "negative",
    "auto": "autoguidance",
    "cfg-zero": "cfg-zero-star",
    "clip": "clip-sample",
}
GUIDANCE_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "apg": {"radius": "norm_threshold"},
    "pag": {"k": "scale"},
}
# Samplers by the names that A1111's web UI has for them.
WEB_UI_SAMPLERS: Mapping[str, str] = {
    "Euler": "euler",
    "Euler a": "euler-ancestral",
    "Heun": "heun",
    "LMS": "lms",
    "DPM2": "kdpm2",
    "DPM2 a": "kdpm2-ancestral",
    "DPM++ 2M": "dpmpp-2m",
    "DPM++ 2M SDE": "dpmpp-2m-sde",
    "DPM++ 3M SDE": "dpmpp-3m-sde",
    "UniPC": "unipc",
    "LCM": "lcm",
    "DDIM": "ddim",
    "PLMS": "pndm",
}
# Options of samplers.
SAMPLER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "euler": {"churn": "s_churn"},
    "heun": {"churn": "s_churn"},
}

# Settings in PNG files, defaults in jaxdiff.json, options and rows in the results of a sweep.
SETTINGS: Mapping[str, str] = {
    "guide": "guidance_model",
    "embeddings": "textual_inversions",
    "timesteps": "timestep_spacing",
    "measured": "evaluate",
    "timed": "measure_speed",
    "every": "prompt_stride",
    "shares": "accuracies",
}

# Fields of the records of captioned images in ArrayRecord files.
RECORDS: Mapping[str, str] = {"picture": "image"}

# Modules that the Python files of configs import.
MODULES: Mapping[str, str] = {"jaxdiff.models.unet_config": "jaxdiff.models.unet.config"}

# The accuracies of a report on scenes.
ACCURACIES: Mapping[str, str] = {
    "one all right": "one object correct",
    "two all right": "two objects correct",
    "held-out one all right": "held-out one object correct",
    "held-out two all right": "held-out two objects correct",
    "held-out all right": "held-out correct",
}


def rename_keys(
    mapping: Mapping[str, T], names: Mapping[str, str], *, source: str = ""
) -> dict[str, T]:
    """`mapping` under today's names; InputError, from `source`, for both names of one thing."""
    renamed: dict[str, T] = {}
    for key, value in mapping.items():
        name = names.get(key, key)
        if name != key and name in mapping:
            where = f"{source}: " if source else ""
            raise InputError(
                f"{where}{name}: got {key} too, two names of one thing, expected {name} alone"
            )
        renamed[name] = value
    return renamed


def rename_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which also takes its keyword arguments under their other names.

    InputError for a name that it does not have, unless it takes any.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name != "self"]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)

    @functools.wraps(function)
    def renamed(*args: P.args, **kwargs: P.kwargs) -> T:
        known = rename_keys(_with_listed_timesteps(kwargs), ARGUMENTS)
        for name in () if takes_any else known:
            one_of(f"{function.__name__}: argument", name, names)
        return function(*args, **known)  # pyright: ignore[reportCallIssue]

    return renamed


def _with_listed_timesteps(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, of which `timesteps` may be a list of numbers, as in diffusers."""
    times = arguments.get("timesteps")
    if not isinstance(times, Iterable) or all(isinstance(t, str | None) for t in times):
        return dict(arguments)
    listed = [str(t) for t in times]
    steps = {} if {"steps", "num_inference_steps"} & arguments.keys() else {"steps": len(listed)}
    return {**arguments, "timesteps": ",".join(listed), **steps}


def former_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module: what its former names stand for."""

    def get(name: str) -> Any:
        if name not in NAMES[module]:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, now = NAMES[module][name]
        return getattr(importlib.import_module(home), now)

    return get


def rename_options(arguments: Sequence[str], rename: Callable[[str], str]) -> list[str]:
    """The arguments of a command under today's names; InputError for both names of one option.

    `rename` gives today's name of an option, which is spelled with hyphens, without leading ones
    and without the `no-` of an inverted flag.
    """
    renamed: list[str] = []
    typed: dict[str, str] = {}  # how each option was spelled first
    for argument in arguments:
        option, equals, value = argument.partition("=")
        spelling = option.removeprefix("--").replace("_", "-")
        if not option.startswith("--"):
            renamed.append(argument)
            continue
        name = rename(_positive(spelling))
        if spelling != _positive(spelling):
            name = _inverted(name)
        first = typed.setdefault(_positive(name), spelling)
        if _positive(first) != _positive(spelling):
            raise InputError(
                f"{_positive(name)}: got --{first} and --{spelling}, two names of one option, "
                f"expected --{name} alone"
            )
        renamed.append(argument if name == spelling else f"--{name}{equals}{value}")
    return renamed


def former_options(command: str) -> Callable[[str], str]:
    """Today's names of the options of a command, for `rename_options`."""
    names = OPTIONS.get(command, {})
    return lambda option: names.get(option, option)


def _positive(option: str) -> str:
    """The option without the `no-` of an inverted flag, as in --no-json and --data.no-flip."""
    section, dot, name = option.rpartition(".")
    return section + dot + name.removeprefix("no-")


def _inverted(option: str) -> str:
    if option != _positive(option):
        return _positive(option)
    section, dot, name = option.rpartition(".")
    return f"{section}{dot}no-{name}"


def rename_guidance(text: str) -> str:
    """The description of a guidance rule, such as "apg:eta=0.2+interval", under today's names."""
    parts = (_rename_choice("guidance", p, GUIDANCE, GUIDANCE_OPTIONS) for p in text.split("+"))
    return "+".join(parts)


def rename_sampler(text: str) -> str:
    """The description of a sampler, such as "heun:s_churn=40", under today's names.

    Names of the web UI may be in lower case.
    """
    lower = {name.lower(): name for name in WEB_UI_SAMPLERS}
    name, colon, options = text.partition(":")
    text = lower.get(name.strip().lower(), name) + colon + options
    return _rename_choice("sampler", text, WEB_UI_SAMPLERS, SAMPLER_OPTIONS)


def _rename_choice(
    kind: str,
    text: str,
    choices: Mapping[str, str],
    option_names: Mapping[str, Mapping[str, str]],
) -> str:
    """NAME or NAME:OPTION=VALUE,... under today's names; spaces stay where they are."""
    name, colon, options = text.partition(":")
    present = choices.get(name.strip(), name.strip())
    pairs = [pair.partition("=") for pair in options.split(",")]
    names = option_names.get(present, {})
    keys = {key.strip() for key, _, _ in pairs}
    for former, key in names.items():
        if former in keys and key in keys:
            raise InputError(
                f"{kind}: {present}: got {former} and {key}, two names of one option, "
                f"expected {key} alone"
            )
    options = ",".join(
        key.replace(key.strip(), names.get(key.strip(), key.strip())) + equals + value
        for key, equals, value in pairs
    )
    return name.replace(name.strip(), present) + colon + options


def rename_settings(settings: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Stored settings under today's names, with today's name of the guidance rule."""
    renamed = rename_keys(settings, SETTINGS, source=source)
    if isinstance(renamed.get("guidance"), str):
        renamed["guidance"] = rename_guidance(renamed["guidance"])
    return renamed
