"""What one call of the pipeline asks for, checked and with every default filled in."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdiff.core.configs import from_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.diffusion.timesteps import SPACINGS
from jaxdiff.samplers.registry import SAMPLERS, STAND_INS, sampler_name

MAX_SCALE = 1000.0
MAX_STEPS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """A model's own choices, used wherever a call leaves one out."""

    guidance_scale: float = 7.5
    steps: int = 50
    sampler: str | None  # None: the scheduler config's has no counterpart here
    timesteps: str | None = None  # spacing of the steps; None: the scheduler config's own
    height: int
    width: int

    def __post_init__(self) -> None:
        _check_scale(self.guidance_scale)
        _check_loop(self.steps, self.sampler, self.timesteps)

    @classmethod
    def of(
        cls,
        stored: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        native: tuple[int, int],
        *,
        source: str,
    ) -> "Defaults":
        """What a model says of itself (jaxdiff.json), the rest from its scheduler and size."""
        values = {"height": native[0], "width": native[1], **stored}
        if "sampler" not in values:
            values["sampler"] = _default_sampler(scheduler)
        return from_mapping(cls, values, source=source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One entry per image in `prompts`, `negative_prompts`, `guidance_scales` and `seeds`."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    guidance_scales: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    sampler: str
    timesteps: str | None
    height: int
    width: int

    def part(self, first: int, count: int) -> "Request":
        """The request for the images first, ..., first + count - 1 of this one."""
        names = ("prompts", "negative_prompts", "guidance_scales", "seeds")
        rows = {name: getattr(self, name)[first : first + count] for name in names}
        return dataclasses.replace(self, **rows)

    def settings(self, index: int) -> dict[str, Any]:
        """Everything that made image `index`, as JSON values."""
        return {
            "prompt": self.prompts[index],
            "negative_prompt": self.negative_prompts[index],
            "guidance_scale": self.guidance_scales[index],
            "seed": self.seeds[index],
            "steps": self.steps,
            "sampler": self.sampler,
            "timesteps": self.timesteps,
            "height": self.height,
            "width": self.width,
        }


def size_of(sample_size: int | Sequence[int] | None, downscale: int) -> tuple[int, int]:
    """Height and width in pixels of the latents that a UNet was made for (64 when it says none)."""
    cells = sample_size or 64
    height, width = (cells, cells) if isinstance(cells, int) else cells
    return height * downscale, width * downscale


def resolve(
    defaults: Defaults,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    seed: int | Sequence[int] = 0,
    pixels_per_cell: int,
    **shared: Any,
) -> Request:
    """The complete request; None takes the model's default, one value serves all images.

    One prompt with several seeds, scales or negative prompts draws one image for each. An integer
    seed s gives image i the seed s + i. Height and width must be multiples of `pixels_per_cell`.
    Raises InputError.
    """
    choices = {name: getattr(defaults, name) for name in ("steps", "sampler", "timesteps")}
    choices |= {"height": defaults.height, "width": defaults.width}
    choices |= {name: value for name, value in shared.items() if value is not None}
    if choices["sampler"] is None:
        raise InputError(
            "sampler: got none, and the model's own scheduler has no counterpart here, "
            f"expected one of {', '.join(SAMPLERS)}"
        )
    scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    columns = {
        "prompt": prompt,
        "negative_prompt": "" if negative_prompt is None else negative_prompt,
        "guidance_scale": scale,
    }
    count = _count(columns | {"seed": seed})
    seeds = np.arange(count) + np.asarray(seed) if _single(seed) else seed
    request = Request(
        prompts=_column("prompt", columns["prompt"], count, str),
        negative_prompts=_column("negative_prompt", columns["negative_prompt"], count, str),
        guidance_scales=_column("guidance_scale", columns["guidance_scale"], count, float),
        seeds=_column("seed", seeds, count, int),
        **choices,
    )
    _check(request, pixels_per_cell)
    return request


def _single(value: Any) -> bool:
    return isinstance(value, str) or np.ndim(value) == 0


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
    return tuple(kind(entry) for entry in entries)


def _check_scale(scale: float) -> None:
    in_range("guidance_scale", scale, 0, MAX_SCALE)


def _default_sampler(scheduler: Mapping[str, Any]) -> str | None:
    """The sampler of a scheduler_config.json; a warning where it is another one's stand-in."""
    try:
        name = sampler_name(scheduler)
    except InputError:
        return None
    asked = str(scheduler.get("_class_name", "")).removeprefix("Flax")
    if asked in STAND_INS:
        warnings.warn(f"scheduler: {name} takes the place of {asked}", stacklevel=2)
    return name


def _check_loop(steps: int, sampler: str | None, timesteps: str | None) -> None:
    in_range("steps", steps, 1, MAX_STEPS)
    if sampler is not None:
        one_of("sampler", sampler, SAMPLERS)
    if timesteps is not None:
        one_of("timesteps", timesteps, SPACINGS)


def _check(request: Request, pixels_per_cell: int) -> None:
    _check_loop(request.steps, request.sampler, request.timesteps)
    for scale in request.guidance_scales:
        _check_scale(scale)
    for seed in request.seeds:
        in_range("seed", seed, 0, 2**32 - 1)
    for name in ("height", "width"):
        size = getattr(request, name)
        if size <= 0 or size % pixels_per_cell:
            low = max(size // pixels_per_cell, 1) * pixels_per_cell
            raise InputError(
                f"{name}: got {size}, expected a multiple of {pixels_per_cell} "
                f"such as {low} or {low + pixels_per_cell}"
            )
