"""A request: what one call of the pipeline generates, checked, with every default filled in."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np

from jaxdiff.checkpoints.schedulers import SPACINGS, prediction_type_of, sampler_name
from jaxdiff.core.aliases import rename_guidance, rename_sampler
from jaxdiff.core.configs import from_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.guidance.base import MAX_SCALE
from jaxdiff.guidance.registry import RULES
from jaxdiff.guidance.registry import parse as parse_rule
from jaxdiff.pipeline.and_prompts import split_and
from jaxdiff.pipeline.prompts import parse
from jaxdiff.samplers.registry import SAMPLERS, get_sampler

MAX_STEPS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """A model's default options."""

    guidance_scale: float = 7.5
    guidance: str = "cfg"
    steps: int = 50
    sampler: str | None  # None: jaxdiff has no counterpart of the scheduler config's
    timestep_spacing: str | None = None  # None: that of the scheduler config
    height: int
    width: int
    # whether the training captions contained only words that are single tokens; jaxdiff then warns
    # of all other words
    closed_vocabulary: bool = False

    def __post_init__(self) -> None:
        _check_scale("guidance_scale", self.guidance_scale)
        _check_loop(self.steps, self.sampler, self.timestep_spacing)
        parse_rule(self.guidance)

    @classmethod
    def of(
        cls,
        stored: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        native: tuple[int, int],
        *,
        source: str,
    ) -> "Defaults":
        """The defaults in jaxdiff.json; all others follow from scheduler config and size."""
        distilled = _distilled(scheduler)
        values = {"height": native[0], "width": native[1], **distilled, **stored}
        if "sampler" not in values:
            values["sampler"] = _default_sampler(scheduler)
        return from_mapping(cls, values, source=source)


class Options(TypedDict, total=False):
    """Options of a call; None takes the model's default.

    A sequence has one entry per image. `Request` documents the others. Options that only some
    families read are declared by their extras (`families.base.Extra`).
    """

    prompt_2: str | Sequence[str | None] | None  # prompt of the second text encoder
    negative_prompt: str | Sequence[str | None] | None  # what the image should not show
    negative_prompt_2: str | Sequence[str | None] | None  # of the second text encoder
    guidance_scale: float | Sequence[float] | None
    guidance: str | None  # such as "cfg" or "apg:eta=0.2+interval:lo=0.3"
    negative_scale: (
        float | Sequence[float | None] | None
    )  # of the negative prompt, in rule "negative"
    classifier_scale: float | Sequence[float | None] | None  # of classifier guidance
    clip_scale: float | Sequence[float | None] | None  # of CLIP guidance
    seed: int | Sequence[int]  # an integer s: image i has seed s + i
    steps: int | Sequence[int | None] | None
    sampler: str | None  # such as "ddim:eta=0.5" or "heun:s_churn=40"
    timestep_spacing: str | Sequence[str | None] | None
    eta: float | None
    height: int | None  # in pixels
    width: int | None
    prompt_syntax: bool | None
    clip_skip: int | None
    strength: float | Sequence[float | None] | None
    denoising_start: float | None
    denoising_end: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One entry per image in the prompts, `guidance_scales` and `seeds`.

    `steps`, `timestep_spacing` and `strength` are one value for all images, or one entry per image.
    """

    prompts: tuple[str, ...]
    prompts_2: tuple[str | None, ...]  # of the second text encoder; None: the same prompts
    negative_prompts: tuple[str | None, ...]  # None: no negative prompt
    negative_prompts_2: tuple[str | None, ...]
    guidance_scales: tuple[float, ...]
    negative_scales: tuple[float | None, ...]  # None: same as the guidance scale
    classifier_scales: tuple[float | None, ...]  # None: no classifier guidance
    clip_scales: tuple[float | None, ...]
    seeds: tuple[int, ...]
    guidance: str = "cfg"  # guidance rule and wrappers
    steps: int | tuple[int, ...]
    sampler: str  # its name and options
    timestep_spacing: str | tuple[str | None, ...] | None
    height: int
    width: int
    eta: float | None = None  # of ddim, 0 to 1; None: the sampler's default
    prompt_syntax: bool = True  # read (word:1.3), [word], BREAK and AND
    clip_skip: int = 0  # layers to skip at the end of the text encoders
    strength: float | tuple[float, ...] | None = None  # how much an initial image changes, 0 to 1
    denoising_start: float | None = None  # fraction of the process that is already done
    denoising_end: float | None = None  # fraction of the process after which to stop
    # options that the model's family reads, where they are not the defaults
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def of(self, name: str, index: int) -> Any:
        """The value of a field for image `index`."""
        value = getattr(self, name)
        return value[index] if name in _EITHER and isinstance(value, tuple) else value

    def to_metadata(self, index: int) -> dict[str, Any]:
        """The settings of image `index` as JSON values; rare options only if set."""
        own = {
            "prompt": self.prompts[index],
            "negative_prompt": self.negative_prompts[index],
            "guidance_scale": self.guidance_scales[index],
            "seed": self.seeds[index],
        }
        seconds = {"prompt_2": self.prompts_2, "negative_prompt_2": self.negative_prompts_2}
        seconds |= {name: getattr(self, f"{name}s") for name in _SCALES}
        own |= {name: column[index] for name, column in seconds.items() if column[index]}
        for field in dataclasses.fields(self):
            value = self.of(field.name, index)
            if field.name not in (*_COLUMNS, "extras") and (
                field.default is dataclasses.MISSING or value != field.default
            ):
                own[field.name] = value
        extras = self.extras.items()
        return own | {k: list(v) if isinstance(v, tuple) else v for k, v in extras}

    def prompts_for_encoder(
        self, index: int
    ) -> tuple[tuple[str | None, str], tuple[str | None, str]]:
        """(negative prompt, prompt) of image `index` for each of the two text encoders."""
        negative, prompt = self.negative_prompts[index], self.prompts[index]
        second = self.negative_prompts_2[index] or negative, self.prompts_2[index] or prompt
        return (negative, prompt), second

    def step_range(self, index: int, times: Float[NDArray, "n"], levels: int) -> tuple[int, int]:
        """First and end (exclusive) of the steps to run for image `index`, of those at `times`.

        A strength s runs the last int(n s) of n steps (SDEdit, 2108.01073); a fraction of the
        process ends at time round(levels (1 - fraction)). InputError if no step is left.
        """

        def steps_until(fraction: float) -> int:
            return int(np.sum(times >= round(levels * (1 - fraction))))

        n, strength = len(times), self.of("strength", index)
        first = 0 if strength is None else n - min(int(n * strength), n)
        first = first if self.denoising_start is None else steps_until(self.denoising_start)
        last = n if self.denoising_end is None else steps_until(self.denoising_end)
        if first >= last:
            names = ("strength", "denoising_start", "denoising_end")
            values = {name: self.of(name, index) for name in names}
            chosen = [f"{name} {value}" for name, value in values.items() if value is not None]
            raise InputError(
                f"steps: got {n} with {', '.join(chosen)}, expected at least one step to run"
            )
        return first, last


_TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
_SCALES = ("negative_scale", "classifier_scale", "clip_scale")
# one value for all images, or one for each
_EITHER: dict[str, type] = {"steps": int, "timestep_spacing": str, "strength": float}
_DEFAULTS = (
    "guidance_scale",
    "guidance",
    "steps",
    "sampler",
    "timestep_spacing",
    "height",
    "width",
)


def _plural(name: str) -> str:
    return name.replace("prompt", "prompts")


_COLUMNS = (
    *map(_plural, _TEXTS),
    "guidance_scales",
    *(f"{name}s" for name in _SCALES),
    "seeds",
)


def size_of(sample_size: int | Sequence[int] | None, vae_scale_factor: int) -> tuple[int, int]:
    """Height and width in pixels for a UNet's `sample_size` (64 if it has none)."""
    latent = sample_size or 64
    height, width = (latent, latent) if isinstance(latent, int) else latent
    return height * vae_scale_factor, width * vae_scale_factor


def resolve(
    defaults: Defaults,
    prompt: str | Sequence[str],
    *,
    images: int = 1,
    vae_scale_factor: int,
    extras: Mapping[str, Any] | None = None,
    **options: Unpack[Options],
) -> Request:
    """The complete request; None takes the model's default, one value serves all images.

    A single prompt with several seeds, scales, steps, other prompts or initial `images` gives one
    image for each. Height and width must be multiples of `vae_scale_factor`. `extras` are options
    that the model's family reads, checked already. Raises InputError.
    """
    chosen: dict[str, Any] = {k: value for k, value in options.items() if value is not None}
    choices = {name: getattr(defaults, name) for name in _DEFAULTS} | chosen
    choices["guidance"] = rename_guidance(choices["guidance"])
    if choices["sampler"] is None:
        raise InputError(
            "sampler: got none for a model whose scheduler has no counterpart in jaxdiff, "
            f"expected one of {', '.join(SAMPLERS)}"
        )
    choices["sampler"] = rename_sampler(choices["sampler"])
    scale, seed = choices.pop("guidance_scale"), choices.pop("seed", 0)
    prompts = {"prompt": prompt} | {name: choices.pop(name, None) for name in _TEXTS[1:]}
    scales = {name: choices.pop(name, None) for name in _SCALES}
    either = {name: choices.get(name) for name in _EITHER}
    columns = prompts | scales | either | {"guidance_scale": scale, "seed": seed}
    count = max(images, _count(columns))
    for name, value in either.items():
        if not _single(value):
            filled = [getattr(defaults, name, None) if v is None else v for v in value or ()]
            choices[name] = _column(name, filled, count, _EITHER[name])
    seeds = np.arange(count) + np.asarray(seed) if _single(seed) else seed
    request = Request(
        **{_plural(name): _column(name, texts, count, str) for name, texts in prompts.items()},
        guidance_scales=_column("guidance_scale", scale, count, float),
        **{f"{name}s": _column(name, values, count, float) for name, values in scales.items()},
        seeds=_column("seed", seeds, count, int),
        extras=extras or {},
        **choices,
    )
    _check(request, vae_scale_factor)
    return request


def _single(value: Any) -> bool:
    return value is None or isinstance(value, str) or np.ndim(value) == 0


def _count(columns: Mapping[str, Any]) -> int:
    """The number of images: the length of the longest column."""
    lengths = {len(column) for column in columns.values() if not _single(column)}
    if 0 in lengths:
        raise InputError("prompt: got an empty list, expected at least one entry")
    return max(lengths, default=1)


def _column(name: str, value: Any, count: int, kind: type) -> tuple[Any, ...]:
    """`value` as one entry of type `kind` for each of `count` images."""
    entries = (value,) * count if _single(value) else tuple(value)
    if len(entries) == 1:
        entries *= count
    if len(entries) != count:
        raise InputError(f"{name}: got {len(entries)} entries, expected 1 or {count}")
    if None in entries and name not in (*_TEXTS[1:], *_SCALES, "timestep_spacing"):
        raise InputError(f"{name}: got None, expected a {kind.__name__}")
    return tuple(None if entry is None else kind(entry) for entry in entries)


def _distilled(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of step-distilled models, which their scheduler config reveals.

    LCM (2310.04378) has distilled guidance, SD-Turbo (2311.17042) uses none. Trailing timesteps
    start at pure noise. There a network that predicts eps says something about the image only if it
    was distilled to start from there.
    """
    name = str(scheduler.get("_class_name", ""))
    if name.startswith("LCM"):
        return {"guidance_scale": 1.0, "steps": 4}
    turbo = (
        name.startswith("Euler")
        and scheduler.get("timestep_spacing") == "trailing"
        and prediction_type_of(scheduler) == "epsilon"
    )
    return {"guidance_scale": 1.0, "steps": 1} if turbo else {}


def _check_scale(name: str, scale: float) -> None:
    in_range(name, scale, 0, MAX_SCALE)


def _default_sampler(scheduler: Mapping[str, Any]) -> str | None:
    """The sampler of a scheduler_config.json, if jaxdiff has it."""
    try:
        return sampler_name(scheduler)
    except InputError:
        return None


def _check_loop(steps: int, sampler: str | None, timestep_spacing: str | None) -> None:
    in_range("steps", steps, 1, MAX_STEPS)
    if sampler is not None:
        get_sampler(sampler)
    if timestep_spacing is not None:
        one_of("timestep_spacing", timestep_spacing, SPACINGS)


def _check_guidance(request: Request) -> None:
    """InputError for a rule that does not support the other options."""
    rule, sampler = parse_rule(request.guidance), get_sampler(request.sampler, request.eta)
    capabilities = rule.capabilities
    if capabilities.separate_eps and not sampler.renoises_along_eps:
        fitting = [name for name, each in SAMPLERS.items() if each.renoises_along_eps]
        raise InputError(
            f"guidance: got {request.guidance} with sampler {request.sampler}, "
            f"expected one of {', '.join(fitting)}"
        )
    for scale in request.guidance_scales:
        name = f"guidance_scale (with guidance {request.guidance})"
        in_range(name, scale, 0, capabilities.max_scale)
    if any(s is not None for s in request.negative_scales) and not capabilities.negative_scale:
        fitting = [name for name, each in RULES.items() if each.capabilities.negative_scale]
        raise InputError(
            f"negative_scale: got it with guidance {request.guidance}, "
            f"expected guidance {' or '.join(fitting)}"
        )
    prompts = [split_and(prompt, syntax=request.prompt_syntax) for prompt in request.prompts]
    rule.for_prompts(max(map(len, prompts)))


def _check(request: Request, vae_scale_factor: int) -> None:
    get_sampler(request.sampler, request.eta)
    for index in range(len(request.prompts)):
        steps, spacing = request.of("steps", index), request.of("timestep_spacing", index)
        _check_loop(steps, request.sampler, spacing)
        for name in ("strength", "denoising_start", "denoising_end"):
            if (value := request.of(name, index)) is not None:
                in_range(name, value, 0, 1)
    in_range("clip_skip", request.clip_skip, 0, 100)
    if request.prompt_syntax:
        for name in _TEXTS:
            for text in getattr(request, _plural(name)):
                parse(text or "")
    for name in ("guidance_scale", *_SCALES):
        for scale in getattr(request, f"{name}s"):
            if scale is not None:
                _check_scale(name, scale)
    _check_guidance(request)
    for seed in request.seeds:
        in_range("seed", seed, 0, 2**32 - 1)
    for name in ("height", "width"):
        size = getattr(request, name)
        if size <= 0 or size % vae_scale_factor:
            low = max(size // vae_scale_factor, 1) * vae_scale_factor
            raise InputError(
                f"{name}: got {size}, expected a multiple of {vae_scale_factor} "
                f"such as {low} or {low + vae_scale_factor}"
            )
