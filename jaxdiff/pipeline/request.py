"""What one call of the pipeline asks for, checked and with every default filled in."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np

from jaxdiff.core.configs import from_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.diffusion.timesteps import SPACINGS
from jaxdiff.guidance.base import innermost
from jaxdiff.guidance.cfg_plus_plus import CFGPlusPlus
from jaxdiff.guidance.classifier_free import NegativePromptGuidance
from jaxdiff.guidance.registry import parse as parse_rule
from jaxdiff.pipeline.prompts import parse
from jaxdiff.samplers.registry import SAMPLERS, get_sampler, sampler_name

_OWN = ("original_size", "crop_top_left", "target_size")
SDXL_SIZE_FIELDS = (*_OWN, *(f"negative_{name}" for name in _OWN))
CFG_PP_SAMPLERS = ("ddim", "euler", "euler-ancestral")  # samplers that follow a noise of its own
MAX_SCALE = 1000.0
MAX_STEPS = 1000
MAX_SIZE = 16384  # pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """A model's own choices, used wherever a call leaves one out."""

    guidance_scale: float = 7.5
    guidance: str = "cfg"
    steps: int = 50
    sampler: str | None  # None: the scheduler config's has no counterpart here
    timesteps: str | None = None  # spacing of the steps; None: the scheduler config's own
    height: int
    width: int
    # whether the model was trained on no other words than those that are one token of its
    # tokenizer, so that any other is worth a warning
    closed_vocabulary: bool = False

    def __post_init__(self) -> None:
        _check_scale("guidance_scale", self.guidance_scale)
        _check_loop(self.steps, self.sampler, self.timesteps)
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
        """What a model says of itself (jaxdiff.json), the rest from its scheduler and size."""
        distilled = _distilled(scheduler)
        values = {"height": native[0], "width": native[1], **distilled, **stored}
        if "sampler" not in values:
            values["sampler"] = _default_sampler(scheduler)
        return from_mapping(cls, values, source=source)


class Options(TypedDict, total=False):
    """What a call may choose beside its prompt; None, or left out, is the model's default.

    Those that may be a sequence have one entry per image. `Request` says what the others mean.
    """

    prompt_2: str | Sequence[str | None] | None  # what a second text encoder reads instead
    negative_prompt: str | Sequence[str | None] | None  # what to keep out of the picture
    negative_prompt_2: str | Sequence[str | None] | None  # the same for the second encoder
    guidance_scale: float | Sequence[float] | None
    guidance: str | None  # the rule, such as "cfg" or "apg:eta=0.2+interval:lo=0.3"
    negative_scale: float | Sequence[float | None] | None  # of a negative stream of its own
    classifier_scale: float | Sequence[float | None] | None  # of the classifier's gradient
    clip_scale: float | Sequence[float | None] | None  # of the gradient of CLIP's distance
    seed: int | Sequence[int]  # an integer s gives image i the seed s + i
    steps: int | None
    sampler: str | None
    timesteps: str | None  # their spacing
    eta: float | None
    height: int | None  # in pixels
    width: int | None
    prompt_syntax: bool | None
    clip_skip: int | None
    strength: float | None
    denoising_start: float | None
    denoising_end: float | None
    original_size: tuple[int, int] | None
    crop_top_left: tuple[int, int] | None
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crop_top_left: tuple[int, int] | None
    negative_target_size: tuple[int, int] | None
    aesthetic_score: float | None
    negative_aesthetic_score: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One entry per image in the prompts, `guidance_scales` and `seeds`."""

    prompts: tuple[str, ...]
    prompts_2: tuple[str | None, ...]  # of a second text encoder; None: the same text
    negative_prompts: tuple[str | None, ...]  # None: nothing was said
    negative_prompts_2: tuple[str | None, ...]
    guidance_scales: tuple[float, ...]
    negative_scales: tuple[float | None, ...]  # None: as the guidance scale
    classifier_scales: tuple[float | None, ...]  # None: no steering
    clip_scales: tuple[float | None, ...]
    seeds: tuple[int, ...]
    guidance: str = "cfg"  # the rule
    steps: int
    sampler: str
    timesteps: str | None
    height: int
    width: int
    eta: float | None = None  # share of fresh noise in a step of ddim, 0 to 1; None: the sampler's
    prompt_syntax: bool = True  # brackets and BREAK in prompts mean something
    clip_skip: int = 0  # layers left out at the end of the text encoders
    strength: float | None = None  # how much of the noise a given image gets, 0 to 1
    denoising_start: float | None = None  # share of the way from noise that is already gone
    denoising_end: float | None = None  # share of the way from noise after which it ends
    original_size: tuple[int, int] | None = None  # height, width that XL is told; None: the image's
    crop_top_left: tuple[int, int] = (0, 0)  # the crop that XL is told
    target_size: tuple[int, int] | None = None  # height, width that XL is told; None: the image's
    negative_original_size: tuple[int, int] | None = None  # in the null stream; None: the same
    negative_crop_top_left: tuple[int, int] | None = None  # None: (0, 0) where it has own numbers
    negative_target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0  # that XL's refiner is told, 0 to 10
    negative_aesthetic_score: float = 2.5  # the same in the null stream

    def to_metadata(self, index: int) -> dict[str, Any]:
        """Everything that made image `index`, as JSON values; rare options where they are used."""
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
            value = getattr(self, field.name)
            if field.name not in _COLUMNS and (
                field.default is dataclasses.MISSING or value != field.default
            ):
                own[field.name] = list(value) if isinstance(value, tuple) else value
        return own

    def prompts_for_encoder(
        self, index: int
    ) -> tuple[tuple[str | None, str], tuple[str | None, str]]:
        """What two text encoders read for image `index`: the null stream's words and its own."""
        negative, prompt = self.negative_prompts[index], self.prompts[index]
        second = self.negative_prompts_2[index] or negative, self.prompts_2[index] or prompt
        return (negative, prompt), second

    def step_range(self, times: Float[NDArray, "n"], levels: int) -> tuple[int, int]:
        """Which of the steps at `times` are run: the first, and the one before which it ends.

        A strength s runs the last int(n s) of n steps (SDEdit, 2108.01073); shares of the way are
        cut at the time round(levels (1 - share)). InputError where no step is left.
        """

        def cut(share: float) -> int:
            return int(np.sum(times >= round(levels * (1 - share))))

        n = len(times)
        first = 0 if self.strength is None else n - min(int(n * self.strength), n)
        first = first if self.denoising_start is None else cut(self.denoising_start)
        last = n if self.denoising_end is None else cut(self.denoising_end)
        if first >= last:
            names = ("strength", "denoising_start", "denoising_end")
            chosen = [f"{x} {getattr(self, x)}" for x in names if getattr(self, x) is not None]
            raise InputError(f"steps: got {n} with {', '.join(chosen)}, which leaves no step")
        return first, last


_TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
_SCALES = ("negative_scale", "classifier_scale", "clip_scale")
_DEFAULTS = ("guidance_scale", "guidance", "steps", "sampler", "timesteps", "height", "width")


def _plural(name: str) -> str:
    return name.replace("prompt", "prompts")


_COLUMNS = (
    *map(_plural, _TEXTS),
    "guidance_scales",
    *(f"{name}s" for name in _SCALES),
    "seeds",
)


def size_of(sample_size: int | Sequence[int] | None, downscale: int) -> tuple[int, int]:
    """Height and width in pixels of the latents that a UNet was made for (64 when it says none)."""
    cells = sample_size or 64
    height, width = (cells, cells) if isinstance(cells, int) else cells
    return height * downscale, width * downscale


def resolve(
    defaults: Defaults,
    prompt: str | Sequence[str],
    *,
    images: int = 1,
    pixels_per_cell: int,
    **options: Unpack[Options],
) -> Request:
    """The complete request; None takes the model's default, one value serves all images.

    One prompt with several seeds, scales, other prompts or given `images` draws one image for each.
    Height and width must be multiples of `pixels_per_cell`. Raises InputError.
    """
    chosen: dict[str, Any] = {k: value for k, value in options.items() if value is not None}
    choices = {name: getattr(defaults, name) for name in _DEFAULTS} | chosen
    if choices["sampler"] is None:
        raise InputError(
            "sampler: got none, and the model's own scheduler has no counterpart here, "
            f"expected one of {', '.join(SAMPLERS)}"
        )
    scale, seed = choices.pop("guidance_scale"), choices.pop("seed", 0)
    texts = {"prompt": prompt} | {name: choices.pop(name, None) for name in _TEXTS[1:]}
    extras = {name: choices.pop(name, None) for name in _SCALES}
    count = max(images, _count(texts | extras | {"guidance_scale": scale, "seed": seed}))
    seeds = np.arange(count) + np.asarray(seed) if _single(seed) else seed
    request = Request(
        **{_plural(name): _column(name, said, count, str) for name, said in texts.items()},
        guidance_scales=_column("guidance_scale", scale, count, float),
        **{f"{name}s": _column(name, said, count, float) for name, said in extras.items()},
        seeds=_column("seed", seeds, count, int),
        **choices,
    )
    _check(request, pixels_per_cell)
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
    if None in entries and name not in (*_TEXTS[1:], *_SCALES):
        raise InputError(f"{name}: got None, expected a {kind.__name__}")
    return tuple(None if entry is None else kind(entry) for entry in entries)


def _distilled(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """What a model that was distilled into few steps wants, known by its scheduler config.

    LCM (2310.04378) has guidance in it, SD-Turbo (2311.17042) has none. Trailing times begin at
    pure noise, where only networks that predict v, or that were distilled to go all the way from
    there, say something about the image.
    """
    name = str(scheduler.get("_class_name", ""))
    if name.startswith("LCM"):
        return {"guidance_scale": 1.0, "steps": 4}
    turbo = (
        name.startswith("Euler")
        and scheduler.get("timestep_spacing") == "trailing"
        and scheduler.get("prediction_type", "epsilon") == "epsilon"
    )
    return {"guidance_scale": 1.0, "steps": 1} if turbo else {}


def _check_scale(name: str, scale: float) -> None:
    in_range(name, scale, 0, MAX_SCALE)


def _default_sampler(scheduler: Mapping[str, Any]) -> str | None:
    """The sampler of a scheduler_config.json, if there is one here."""
    try:
        return sampler_name(scheduler)
    except InputError:
        return None


def _check_loop(steps: int, sampler: str | None, timesteps: str | None) -> None:
    in_range("steps", steps, 1, MAX_STEPS)
    if sampler is not None:
        one_of("sampler", sampler, SAMPLERS)
    if timesteps is not None:
        one_of("timesteps", timesteps, SPACINGS)


def _check_guidance(request: Request) -> None:
    """InputError for rules that cannot do what else the request says."""
    rule = innermost(parse_rule(request.guidance))
    if isinstance(rule, CFGPlusPlus):
        if request.sampler not in CFG_PP_SAMPLERS:
            raise InputError(
                f"guidance: got cfg-pp with sampler {request.sampler}, "
                f"expected one of {', '.join(CFG_PP_SAMPLERS)}"
            )
        for scale in request.guidance_scales:
            in_range("guidance_scale of cfg-pp", scale, 0, 1)
    if any(s is not None for s in request.negative_scales) and not isinstance(
        rule, NegativePromptGuidance
    ):
        raise InputError(f"negative_scale: got it with guidance {request.guidance}, expected three")


def _check(request: Request, pixels_per_cell: int) -> None:
    _check_loop(request.steps, request.sampler, request.timesteps)
    get_sampler(request.sampler, request.eta)
    for name in ("strength", "denoising_start", "denoising_end"):
        if getattr(request, name) is not None:
            in_range(name, getattr(request, name), 0, 1)
    for name in ("aesthetic_score", "negative_aesthetic_score"):
        in_range(name, getattr(request, name), 0, 10)
    in_range("clip_skip", request.clip_skip, 0, 100)
    for name in SDXL_SIZE_FIELDS:
        for length in getattr(request, name) or ():
            in_range(name, length, 0, MAX_SIZE)
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
        if size <= 0 or size % pixels_per_cell:
            low = max(size // pixels_per_cell, 1) * pixels_per_cell
            raise InputError(
                f"{name}: got {size}, expected a multiple of {pixels_per_cell} "
                f"such as {low} or {low + pixels_per_cell}"
            )
