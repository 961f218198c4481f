"""What a line of a prompt file says of its images, checked, and how these are named."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

from jaxdiff.core.configs import prefix_errors, typed
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, one_of, positive

IMAGES = ("image", "original_image", "mask")  # fields that are files
MAX_IMAGES = 1_000_000  # of a line
MAX_SEED = 2**32 - 1


class LoRA(NamedTuple):
    """A LoRA of the images of a line: a file or folder, and its scale."""

    path: str
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """One line of a prompt file; fields that it leaves out come from the command line."""

    prompt: str
    prompt_2: str | None = None
    negative_prompt: str | None = None
    negative_prompt_2: str | None = None
    prompt_3: str | None = None
    negative_prompt_3: str | None = None
    guidance_scale: float | None = None
    guidance: str | None = None
    negative_scale: float | None = None
    classifier_scale: float | None = None
    clip_scale: float | None = None
    steps: int | None = None
    sampler: str | None = None
    timestep_spacing: str | None = None
    eta: float | None = None
    height: int | None = None
    width: int | None = None
    clip_skip: int | None = None
    max_sequence_length: int | None = None
    prompt_syntax: bool | None = None
    image: str | None = None  # a file, relative to the prompt file's folder
    original_image: str | None = None  # what changes where `image` is one to enlarge
    mask: str | None = None
    strength: float | None = None
    seed: int | None = None
    num_images: int | None = None
    loras: tuple[LoRA, ...] | None = None  # files too; (): none, whatever the defaults are
    # options that the model's family reads; in a file they stand beside the others
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


FIELDS = tuple(f.name for f in dataclasses.fields(PromptSpec) if f.name != "options")
_HINTS: Mapping[str, Any] = get_type_hints(PromptSpec)


def parse_spec(values: Mapping[str, Any], source: str, folder: str) -> PromptSpec:
    """The prompt of a line with these JSON values; None stands for one that is left out.

    Relative paths are relative to `folder`, that of the prompt file. Raises InputError, which
    begins with `source` and names the key, for an unknown key, and for a value of another type.
    Options that only some models have are checked where requests are made.
    """
    own: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in values.items():
        if name not in FIELDS:
            options[one_of(f"{source}: field", name, _known_fields())] = value
        elif name == "loras":
            own[name] = None if value is None else _loras(value, source)
        else:
            own[name] = typed(f"{source}: {name}", value, _HINTS[name])
    if "prompt" not in own:
        raise InputError(f"{source}: got no field 'prompt', expected one")
    with prefix_errors(source):
        _check_values(own)
        for name in IMAGES:
            if own.get(name) is not None:
                own[name] = _resolved(name, own[name], folder)
        if own.get("loras"):
            own["loras"] = tuple(
                LoRA(_resolved("loras", lora.path, folder), lora.scale) for lora in own["loras"]
            )
    return PromptSpec(**own, options=options)


@functools.cache
def _known_fields() -> tuple[str, ...]:
    from jaxdiff.families.options import request_options  # only now: it waits for jax

    return (*FIELDS, *request_options())


def _check_values(values: Mapping[str, Any]) -> None:
    """InputError for what no model can take."""
    for name, value in values.items():
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise InputError(f"{name}: got {value!r:.80}, expected text, without halves of pairs")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}: got {value}, expected a finite number")
    for name in ("steps", "height", "width", "max_sequence_length"):
        if values.get(name) is not None:
            positive(name, values[name])
    if values.get("num_images") is not None:
        in_range("num_images", values["num_images"], 1, MAX_IMAGES)
    if values.get("seed") is not None:
        in_range("seed", values["seed"], 0, MAX_SEED)


def _loras(value: Any, source: str) -> tuple[LoRA, ...]:
    """The LoRAs in a list of PATH, PATH:SCALE or {"path": ..., "scale": ...}."""
    if not isinstance(value, list | tuple):
        raise InputError(f"{source}: loras: got {value!r:.80}, expected a list")
    return tuple(_lora(each, f"{source}: loras") for each in value)


def _lora(value: Any, source: str) -> LoRA:
    if isinstance(value, str):
        from jaxdiff.checkpoints.lora_names import path_and_scale  # only now: lines rarely have any

        path, scale = path_and_scale(value)
        lora = LoRA(str(path), scale)
    elif isinstance(value, Mapping):
        for name in value:
            one_of(f"{source}: field", name, LoRA._fields)
        if "path" not in value:
            raise InputError(f"{source}: got no field 'path', expected one")
        scale = value.get("scale")
        lora = LoRA(
            typed(f"{source}: path", value["path"], str),
            typed(f"{source}: scale", 1.0 if scale is None else scale, float),
        )
    else:
        raise InputError(
            f"{source}: got {value!r:.80}, expected PATH, PATH:SCALE or an object with path "
            "and scale"
        )
    if not lora.path or not math.isfinite(lora.scale):
        raise InputError(f"{source}: got {value!r:.80}, expected a path and a finite scale")
    return lora


def _resolved(name: str, path: str, folder: str) -> str:
    """A path in a prompt file as the process finds it."""
    if "://" not in folder:
        return path if "://" in path else str(pathlib.Path(folder) / path)
    if not posixpath.isabs(path) and "://" not in path:
        raise InputError(
            f"{name}: got {path}, relative to {folder}, expected an absolute path or a URL"
        )
    return path


def table_value(name: str, value: Any) -> Any:
    """What a cell of a table says of field `name`: text is parsed by the type of the field.

    None for an empty one. A text that is no such value stays text, which `parse_spec` refuses.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    kinds = getattr(_HINTS.get(name), "__args__", (_HINTS.get(name),))
    if name == "loras":
        return _table_loras(value)
    if isinstance(value, str) and str not in kinds:
        value = _parsed(value.strip(), kinds)
    # A column of integers with gaps has floats.
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole and int in kinds else value


def _table_loras(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.lstrip().startswith(("[", "{")) else [value.strip()]
    except ValueError:
        return value


def _parsed(text: str, kinds: Sequence[Any]) -> Any:
    """The number or truth value that a text is, or else the text."""
    if bool in kinds:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    for kind in (int, float):
        if kind in kinds or (kind is float and int in kinds):
            with contextlib.suppress(ValueError):
                return kind(text)
    if int in kinds or float in kinds:
        return text
    try:
        return json.loads(text)  # of an option of a family, whose type is not known here
    except ValueError:
        return text


def with_defaults(line: PromptSpec, defaults: PromptSpec) -> PromptSpec:
    """`line` with the defaults; those of mask and strength apply only to lines with an image."""
    own = {name: value for name in FIELDS if (value := getattr(line, name)) is not None}
    options = {k: v for k, v in line.options.items() if v is not None}
    filled = dataclasses.replace(defaults, **own, options={**defaults.options, **options})
    if filled.image is None:
        return dataclasses.replace(filled, mask=line.mask, strength=line.strength)
    return filled


def image_seeds(spec: PromptSpec) -> range:
    """The seeds of the images of a line: image j has `seed + j`. Raises InputError."""
    first, count = spec.seed or 0, 1 if spec.num_images is None else spec.num_images
    in_range("num_images", count, 1, MAX_IMAGES)
    in_range("seed", first, 0, MAX_SEED)
    in_range("seed", first + count - 1, 0, MAX_SEED)
    return range(first, first + count)


def slug(prompt: str) -> str:
    """`prompt` as the start of a file name: lower-case words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:80] or "image"


def image_name(index: int, prompt: str, seed: int) -> str:
    """The name of the file of an image, without suffix; `index` is that of its line."""
    return f"{index:06d}_{slug(prompt)}_{seed}"
