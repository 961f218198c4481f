"""Requests: what a call of the pipeline generates, one for each image, complete and checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import numpy as np

from jaxdiff.core.aliases import rename_guidance, rename_sampler
from jaxdiff.core.columns import as_column, column_length, is_single
from jaxdiff.core.configs import prefix_errors, typed
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray
from jaxdiff.core.validate import in_range, multiple_of, one_of
from jaxdiff.data.image_arrays import image_size
from jaxdiff.diffusion.grids import SPACINGS, listed_timesteps
from jaxdiff.families.base import Family
from jaxdiff.families.options import accepted_options, request_options, varies_image
from jaxdiff.guidance.base import MAX_SCALE, RULES, is_unguided
from jaxdiff.guidance.base import parse as parse_rule
from jaxdiff.pipeline.prompts import parse_syntax, split_and
from jaxdiff.pipeline.request_metadata import NUMBERED, SCALES, TEXTS, to_metadata
from jaxdiff.samplers.base import SAMPLERS, get_sampler

MAX_STEPS = 1000
MIN_LENGTH = 2  # tokens: one of text, and the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What one image is generated from: checked, with every default filled in."""

    prompt: str
    negative_prompt: str | None  # None: no negative prompt
    guidance_scale: float
    seed: int
    prompt_2: str | None = None  # of the second text encoder; None: the same prompt
    negative_prompt_2: str | None = None
    prompt_3: str | None = None  # of the third
    negative_prompt_3: str | None = None
    negative_scale: float | None = None  # None: same as the guidance scale
    classifier_scale: float | None = None  # None: no classifier guidance
    clip_scale: float | None = None
    guidance: str = "cfg"  # guidance rule and wrappers
    steps: int
    sampler: str  # its name and options
    timestep_spacing: str | None
    height: int
    width: int
    eta: float | None = None  # of ddim, 0 to 1; None: the sampler's default
    prompt_syntax: bool = True  # read (word:1.3), [word], BREAK and AND
    clip_skip: int = 0  # layers to skip at the end of the text encoders
    # tokens of a text that T5 reads, padding included; None: the model's number
    max_sequence_length: int | None = None
    strength: float | None = None  # how much an initial image changes, 0 to 1
    denoising_start: float | None = None  # fraction of the process that is already done
    denoising_end: float | None = None  # fraction of the process after which to stop
    # options that the model's family reads, where they are not the defaults
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    # what the image begins with: PIL, uint8 (h, w, 3), a path, or scaled latents (h, w, c); the
    # mask is white where the image is repainted; noise (h, w, c) is used instead of the seed's
    image: Any = dataclasses.field(default=None, compare=False, repr=False)
    mask: Any = dataclasses.field(default=None, compare=False, repr=False)
    noise: Float[NDArray, "*d"] | None = dataclasses.field(default=None, compare=False, repr=False)
    # of which a network gets CLIP's embedding: PIL, uint8 (h, w, 3), or a path
    image_prompt: Any = dataclasses.field(default=None, compare=False, repr=False)
    # what a network enlarges: PIL, uint8 (h, w, 3), a path, or floats in [-1, 1]
    low_resolution: Any = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def given_arrays(self) -> tuple[bool, ...]:
        """Whether image, mask, noise, image_prompt and low_resolution are given."""
        return tuple(getattr(self, name) is not None for name in _ARRAYS)

    @property
    def begins_with_latents(self) -> bool:
        """Whether the initial image is given as latents."""
        image = self.image
        return isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating)

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """What images of one batch have in common."""
        fields = (f.name for f in dataclasses.fields(self) if f.compare and f.name != "extras")
        shared = tuple(getattr(self, name) for name in fields if name not in _PER_IMAGE)
        small = None if self.low_resolution is None else image_size(self.low_resolution, 1)
        return *shared, *self.given_arrays, self.begins_with_latents, small

    def to_metadata(self) -> dict[str, Any]:
        """The settings as JSON values; rare options only if set, arrays as their hash."""
        return to_metadata(self)

    def prompts_for_encoder(self) -> tuple[tuple[str | None, str], ...]:
        """(negative prompt, prompt) for each of up to three text encoders."""
        negative, prompt = self.negative_prompt, self.prompt
        return (
            (negative, prompt),
            (self.negative_prompt_2 or negative, self.prompt_2 or prompt),
            (self.negative_prompt_3 or negative, self.prompt_3 or prompt),
        )

    def step_range(
        self, times: Float[NDArray, "n"], levels: int, *, round_up: bool = False
    ) -> tuple[int, int]:
        """First and end (exclusive) of the steps to run, of those at `times`.

        A strength s runs the last int(n s) of n steps (SDEdit, 2108.01073), with `round_up` the
        next whole number; a fraction of the process ends at time round(levels (1 - fraction)).
        InputError if no step is left.
        """

        def steps_until(fraction: float) -> int:
            return int(np.sum(times >= round(levels * (1 - fraction))))

        n = len(times)
        first = 0
        if self.strength is not None:
            wanted = min(n * self.strength, n)
            first = int(n - wanted) if round_up else n - int(wanted)
        first = first if self.denoising_start is None else steps_until(self.denoising_start)
        last = n if self.denoising_end is None else steps_until(self.denoising_end)
        if first >= last:
            names = ("strength", "denoising_start", "denoising_end")
            values = {name: getattr(self, name) for name in names}
            chosen = [f"{name} {value}" for name, value in values.items() if value is not None]
            raise InputError(
                f"steps: got {n} with {', '.join(chosen)}, expected at least one step to run"
            )
        return first, last


class Requests(tuple[Request, ...]):
    """The requests of a call, one per image, which can also be read by columns.

    `requests.prompts`, `requests.seeds` and `requests.guidance_scales` are tuples, one entry per
    image. Under its own name, such as `requests.steps`, a field is the value that all images share,
    or else such a tuple.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        field = _COLUMNS.get(name, name)
        if field not in Request.__dataclass_fields__:
            raise AttributeError(f"'Requests' object has no attribute {name!r}")
        column = tuple(getattr(request, field) for request in self)
        shared = name == field and all(value == column[0] for value in column)
        return column[0] if shared else column


_TYPES: Mapping[str, Any] = get_type_hints(Request)
_ARRAYS = ("image", "mask", "noise", "image_prompt", "low_resolution")
_NEGATIVES = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")
# fields that may differ between the images of a call
_PER_IMAGE: dict[str, type] = {
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(("guidance_scale", *SCALES), float),
    "seed": int,
    "steps": int,
    "timestep_spacing": str,
    "strength": float,
}
_RANGES = {
    **dict.fromkeys(("strength", "denoising_start", "denoising_end"), (0, 1)),
    "steps": (1, MAX_STEPS),
    "clip_skip": (0, 100),
    **dict.fromkeys(("guidance_scale", *SCALES), (0, MAX_SCALE)),
    "seed": (0, 2**32 - 1),
}
_FILLED = ("steps", "timestep_spacing", "strength")  # where None in a list is the model's default
# `Requests` by columns: prompts_2, guidance_scales, seeds, ...
_COLUMNS = {
    name.replace("prompt", "prompts") if name in TEXTS else f"{name}s": name
    for name in (*TEXTS, "guidance_scale", *SCALES, "seed")
}


def resolve(
    defaults: Any,  # the model's `Defaults`
    prompt: str | Sequence[str],
    *,
    family: Family,
    vae_scale_factor: int,
    network: Any = None,
    images: Mapping[str, Sequence[Any]] | None = None,
    **options: Any,
) -> Requests:
    """The complete requests; None takes the model's default, one value serves all images.

    A single prompt with several seeds, scales, steps, other prompts or initial images gives one
    image for each. Height and width must be multiples of `vae_scale_factor` times the family's own.
    `network` is the model's adapter, which says what it can serve (None: everything). `images` has
    the columns of image, mask, image_prompt and low_resolution. Raises InputError.
    """
    read, chosen = request_options(), {k: v for k, v in options.items() if v is not None}
    extras = {name: chosen.pop(name) for name in read if name in chosen}
    values: dict[str, Any] = {"prompt": prompt, "negative_prompt": None}
    values |= {name: own for name, own in vars(defaults).items() if name in _TYPES} | chosen
    if values["sampler"] is None:
        raise InputError(
            "sampler: got none for a model whose scheduler has no counterpart in jaxdiff, "
            f"expected one of {', '.join(SAMPLERS)}"
        )
    shared = (values.keys() & _TYPES.keys()) - _PER_IMAGE.keys()
    values |= {name: typed(name, values[name], _TYPES[name]) for name in shared}
    values["guidance"] = rename_guidance(values["guidance"])
    if defaults.clipping is not None:
        values["guidance"] = defaults.with_clipping(values["guidance"])
    values["sampler"] = rename_sampler(values["sampler"])
    given = {name: values.pop(name) for name in _PER_IMAGE if name in values} | dict(images or {})
    # one value of an extra's option for each image, or one, as a tuple, for all
    given |= {n: value if read[n].is_column(value) else [value] for n, value in extras.items()}
    count, seed = column_length(given), given.get("seed", 0)
    if is_single(seed):
        first = typed("seed", seed, int)
        given["seed"] = range(first, first + count)
    columns = {name: _column(name, value, count, defaults) for name, value in given.items()}
    requests = []
    for row in zip(*columns.values(), strict=True):
        own = dict(zip(columns, row, strict=True))
        options = accepted_options(family, {name: own.pop(name) for name in extras})
        requests.append(Request(**own, **values, extras=options))
    requests = Requests(requests)
    for request in requests:
        check(request, family, network, vae_scale_factor)
        if "guidance" not in chosen:
            _check_scale_is_used(request, defaults, family)
    return requests


def _column(name: str, value: Any, count: int, defaults: Any) -> tuple[Any, ...]:
    """`value` as one entry for each of `count` images."""
    entries = as_column(name, value, count)
    if name not in _PER_IMAGE:
        return entries
    if name in _FILLED and not is_single(value):
        entries = tuple(getattr(defaults, name, None) if e is None else e for e in entries)
    own = (typed(name, entry, _TYPES[name]) for entry in entries)
    return tuple(None if entry is None else _PER_IMAGE[name](entry) for entry in own)


def _check_guidance(request: Request, network: Any) -> None:
    """InputError for a rule or a sampler that does not support the rest."""
    rule, sampler = parse_rule(request.guidance), get_sampler(request.sampler, request.eta)
    if network is not None:
        sampler.check_variance(learned=network.learns_variance)
        if any(stream.perturbed for stream in rule.streams):
            network.check_perturbed()
    capabilities = rule.capabilities
    if capabilities.separate_eps and not sampler.renoises_along_eps:
        fitting = [name for name, each in SAMPLERS.items() if each.renoises_along_eps]
        raise InputError(
            f"guidance: got {request.guidance} with sampler {request.sampler}, "
            f"expected one of {', '.join(fitting)}"
        )
    name = f"guidance_scale (with guidance {request.guidance})"
    in_range(name, request.guidance_scale, 0, capabilities.max_scale)
    if request.negative_scale is not None and not capabilities.negative_scale:
        fitting = [name for name, each in RULES.items() if each.capabilities.negative_scale]
        raise InputError(
            f"negative_scale: got it with guidance {request.guidance}, "
            f"expected guidance {' or '.join(fitting)}"
        )
    for name in () if rule.reads_negative_prompt else _NEGATIVES:
        if got := getattr(request, name):
            fitting = [rule for rule, each in RULES.items() if each.reads_negative_prompt]
            raise InputError(
                f"{name}: got {got!r:.60} with guidance {request.guidance}, which reads none, "
                f"expected no negative prompt, or guidance {', '.join(fitting)}"
            )
    parts = len(split_and(request.prompt, syntax=request.prompt_syntax))
    with prefix_errors(f"guidance {request.guidance}"):
        rule.for_prompts(parts)
    for name in ("classifier_scale", "clip_scale"):
        if getattr(request, name) and parts > 1:
            raise InputError(f"{name}: got {request.prompt!r:.60}, expected a prompt without AND")


def check_options(options: Mapping[str, Any]) -> None:
    """InputError for options of one image that suit no model; None takes the model's default.

    These are names, types and ranges, each option by itself: no model needs to be loaded.
    """
    given = {name: value for name, value in options.items() if value is not None}
    families = request_options()
    for name, value in given.items():
        if name in families:
            families[name].check(name, value)
        else:
            typed(name, value, _TYPES[one_of("option", name, _TYPES)])
    if "sampler" in given:
        get_sampler(given["sampler"], given.get("eta"))
    spacing = given.get("timestep_spacing")
    if spacing is not None and listed_timesteps(spacing) is None:
        one_of("timestep_spacing", spacing, SPACINGS)
    if "guidance" in given:
        parse_rule(given["guidance"])
    for name, (low, high) in _RANGES.items():
        if name in given:
            in_range(name, given[name], low, high)
    if given.get("prompt_syntax", True):
        for name in TEXTS:
            parse_syntax(given.get(name, ""))


def _check_scale_is_used(request: Request, defaults: Any, family: Family) -> None:
    """InputError for a guidance scale without effect, as the model's own rule is none."""
    unguided = is_unguided(request.guidance) and not family.uses_guidance_scale
    # Other programs ask with 0 for the conditional model, which 1 is here.
    if unguided and request.guidance_scale not in (0, 1, defaults.guidance_scale):
        raise InputError(
            f"guidance_scale: got {request.guidance_scale} with guidance {request.guidance}, the "
            f"rule of {family.name}, which has no scale, expected 1, or a rule such as cfg"
        )


def check(request: Request, family: Family, network: Any, vae_scale_factor: int) -> None:
    """InputError for a request that a model of this family and `network` cannot serve."""
    options = {n: getattr(request, n) for n in _TYPES if n not in ("extras", *_ARRAYS)}
    for name in (name for name, value in options.items() if value is None):
        typed(name, None, _TYPES[name])  # which not all fields can be
    check_options(options)
    _check_guidance(request, network)
    multiple = vae_scale_factor * family.latent_multiple
    if family.embeddings is not None and (request.height, request.width) != (1, 1):
        size = f"{request.height}x{request.width}"
        raise InputError(f"height, width: got {size}, expected none for {family.name}")
    for name in ("height", "width"):
        size = multiple_of(name, getattr(request, name), multiple)
        limit = family.latent_limit and vae_scale_factor * family.latent_limit
        if limit is not None and size > limit:
            raise InputError(
                f"{name}: got {size}, expected at most {limit}, for which the network has positions"
            )
    if request.strength is not None and request.denoising_start is not None:
        raise InputError(
            f"strength: got {request.strength} with denoising_start {request.denoising_start}, "
            "expected only one of them"
        )
    for name in ("strength", "denoising_start", "mask") if request.image is None else ():
        if (value := getattr(request, name)) is not None:
            got = "a mask" if name == "mask" else value
            image = "an original_image" if family.enlarges or varies_image(family) else "an image"
            raise InputError(f"{name}: got {got} without {image}, expected {image} too")
    _check_family(request, family)


def _check_family(request: Request, family: Family) -> None:
    """InputError for options that neither the text encoders nor the network take."""
    for name in NUMBERED:
        got, number = getattr(request, name), int(name[-1])
        if got and number not in family.prompt_numbers:
            which = {2: "second", 3: "third"}[number]
            raise InputError(
                f"{name}: got {got!r:.60}, expected none for a model without a {which} text encoder"
            )
    if (length := request.max_sequence_length) is not None:
        limits = [spec.max_length for spec in family.text_encoders if spec.max_length]
        if not limits:
            raise InputError(f"max_sequence_length: got {length}, expected none for {family.name}")
        in_range("max_sequence_length", length, MIN_LENGTH, max(limits))
    unread = () if family.reads_prompt else ("prompt", "negative_prompt")
    for name in (*unread, *(() if family.skips_layers else ("clip_skip",))):
        if got := getattr(request, name):
            raise InputError(f"{name}: got {got!r:.60}, expected none for {family.name}")
    second = request.negative_prompt_2
    if second and request.negative_prompt is None and family.zero_uncond:
        raise InputError(
            f"negative_prompt_2: got {second!r:.60} without a negative_prompt, "
            'expected a negative_prompt too (it may be "")'
        )
    texts = [part.text for part in split_and(request.prompt, syntax=request.prompt_syntax)]
    texts.append(request.negative_prompt or "")
    accepted_options(family, request.extras)
    read = {"low_resolution": family.enlarges, "image_prompt": varies_image(family)}
    for name in (name for name in read if not read[name] and getattr(request, name) is not None):
        raise InputError(f"{name}: got an image, expected none for {family.name}")
    names = ("guidance", "guidance_scale", "image", "image_prompt", "mask", "strength")
    own = {name: getattr(request, name) for name in (*names, "denoising_start")}
    for extra in family.extras:
        extra.check({**own, **request.extras}, texts)
