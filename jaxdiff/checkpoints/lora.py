"""Adapter files (LoRA and its relatives) in the spellings that trainers write: changes of weights.

Which weights their names stand for is in `lora_targets`, what a format does to one in
`lora_formats`.
"""

import dataclasses
import math
import pathlib
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np

from jaxdiff.checkpoints.adapter_info import UNKNOWN, find_adapter
from jaxdiff.checkpoints.file_kinds import kind_of_model, unsupported_family
from jaxdiff.checkpoints.inversion_names import BUNDLED
from jaxdiff.checkpoints.jsonfiles import parse_object, read_object
from jaxdiff.checkpoints.lora_change import Change, Difference, Scaled, Shape, Swapped
from jaxdiff.checkpoints.lora_formats import (
    BIASES,
    FORMATS,
    control_tensor,
    format_of,
    kind_of,
    unsupported,
)
from jaxdiff.checkpoints.lora_names import TRANSFORMER, UNET, settings_file, weights_file
from jaxdiff.checkpoints.lora_products import LoRA
from jaxdiff.checkpoints.lora_rotations import OFT
from jaxdiff.checkpoints.lora_scalings import DoRA, PeftIA3
from jaxdiff.checkpoints.lora_targets import Target, Targets
from jaxdiff.checkpoints.safetensors import TensorInfo, read_metadata, read_tensor
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.errors import InputError

OF_UNETS = "Stable Diffusion 1, 2 or XL"
OF_TRANSFORMERS = "Stable Diffusion 3 or FLUX.1"
SUPPORTED = "Stable Diffusion 1, 2, XL or 3, FLUX.1 or Chroma"
METADATA = "lora_adapter_metadata"  # diffusers' JSON with alphas, in the header of the file
# Values of PEFT's `init_lora_weights` with which the adapter belongs to other weights.
MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")

# In names of weights of UNets.
_OF_UNETS = re.compile(
    r"(down|up|input|output)_blocks|(mid|middle)_block|conv_(in|out)|time_emb|add_embedding"
)
NAMES = {form.name for form in FORMATS}

Roles = Mapping[str, TensorInfo]  # the tensors of one module
Changes = dict[str, dict[Target, Change]]  # component -> parameter -> its change


def read_lora(
    source: pathlib.Path, shapes: Mapping[str, Mapping[str, Shape]], family: str = OF_UNETS
) -> Changes:
    """The changes in an adapter file, or in a folder with one; embeddings in it are left out.

    `shapes` are those of the weights of the model's components, by path and in its own layout, and
    `family` is what it is called. Raises InputError that lists what fits nothing.
    """
    path = weights_file(source)
    entries = {n: e for n, e in read_weights(path).items() if not n.startswith(BUNDLED)}
    reject_unsupported(path, entries)
    targets = Targets(shapes)
    modules: dict[tuple[str, str], dict[str, TensorInfo]] = defaultdict(dict)
    strange = []
    for name, entry in entries.items():
        found = targets.find(name)
        if found is None or found[2] in modules[found[:2]]:
            strange.append(name)
        else:
            modules[found[:2]][found[2]] = entry
    if strange:
        reject_other_models(path, entries, family, shapes)
    reject_unknown_keys(path, "names that fit nothing in this model", strange)
    settings = AdapterSettings(path)
    changes: Changes = defaultdict(dict)
    halves, unfit = [], {}
    for (component, module), roles in modules.items():
        keys = targets.shapes(component)
        biased = f"{module}.bias" in keys
        found = _changes(roles, component, module, settings, biased=biased)
        own = {f"{module}.{leaf}": change for leaf, change in found.items()}
        if own and all(key in keys and change.fits(keys[key]) for key, change in own.items()):
            for key, change in own.items():
                names, swapped = targets.parts(component, key)
                place = names[0] if len(names) == 1 else names
                changes[component][place] = Swapped(change=change) if swapped else change
        elif missing := _missing(roles):
            halves.append(f"{_label(roles)} without {', '.join(missing)}")
        else:
            unfit[_label(roles)] = _misfit(roles, keys.get(f"{module}.weight"))
    reject_unknown_keys(path, "factors of which some are missing", halves)
    first = next(iter(sorted(unfit.items())), ("", ""))
    reject_unknown_keys(path, "factors that fit no weight", unfit, f"none; the first: {first[1]}")
    if not changes:
        raise InputError(f"{path}: got no factors, expected a LoRA")
    return dict(changes)


def _changes(
    roles: Roles, component: str, module: str, settings: "AdapterSettings", *, biased: bool
) -> dict[str, Change]:
    """The changes of a module's weight and bias; none if its tensors do not make up a format.

    `biased` is whether the module has a bias.
    """
    arrays = {
        role: read_tensor(entry).astype(np.float32)
        for role, entry in roles.items()
        if role != "alpha"
    }
    own = {role: array for role, array in arrays.items() if role not in (*DoRA.tensors, *BIASES)}
    form = format_of({role: array.shape for role, array in own.items()})
    if any(array.size == 0 for array in arrays.values()) or (own and form is None):
        return {}
    found: dict[str, Change] = {}
    scale = 1.0
    if form is not None:
        change = form(**own, **settings.options(form, component, module))
        if isinstance(change, Scaled):
            if any(array.ndim < 2 for array in own.values()):
                return {}
            scale = settings.scale(component, module, change.rank, roles.get("alpha"))
            change = dataclasses.replace(change, scale=scale)
        elif isinstance(change, OFT) and "alpha" in roles:
            change = dataclasses.replace(change, alpha=read_number(roles["alpha"]))
        found["weight"] = change
        if isinstance(change, PeftIA3) and change.axis == 0 and biased:
            found["bias"] = change  # the layer's output is multiplied
    if magnitudes := {role: arrays[role] for role in DoRA.tensors if role in arrays}:
        if form is None or len(magnitudes) > 1:
            return {}
        found["weight"] = DoRA.of(found["weight"], magnitudes)
    if biases := {role: arrays[role] for role in BIASES if role in arrays}:
        if len(biases) > 1 or ("lora_bias" in biases and form is not LoRA):
            return {}
        factor = np.float32(scale if "lora_bias" in biases else 1)
        found["bias"] = Difference(diff=factor * next(iter(biases.values())))
    return found


def _label(roles: Roles) -> str:
    """A module in an error: a tensor of it, if possible one that LoRA has not, and its format."""
    role = _first(roles)
    return f"{roles[role].name}, {kind_of({role: roles[role].shape})}"


def _first(roles: Roles) -> str:
    """The role that says most of a module's format."""
    return max(sorted(roles), key=lambda role: (role != "alpha", role not in LoRA.tensors))


def _missing(roles: Roles) -> list[str]:
    """The tensors that a module lacks, by name where a LoRA lacks half; none if it has all."""
    forms = [form for form in FORMATS if form.tensors.keys() & roles.keys()]
    forms.sort(key=lambda form: _first(roles) not in form.tensors)
    missing = sorted(forms[0].needed() - roles.keys()) if forms else []
    if forms[:1] != [LoRA] or len(missing) != 1:
        return missing
    (there,) = {"down", "up"} & roles.keys()
    name = roles[there].name
    pairs = (("lora_down", "lora_up"), ("lora_A", "lora_B"), ("down", "up"))
    down, up = next(pair for pair in pairs if pair[there == "up"] in name)
    own, other = (up, down) if there == "up" else (down, up)
    start, _, end = name.rpartition(own)
    return [f"{start}{other}{end}"]


def _misfit(roles: Roles, shape: Shape | None) -> str:
    """The shapes of a module's tensors, and of its weight."""
    got = ", ".join(f"{role} {roles[role].shape}" for role in sorted(roles) if role != "alpha")
    return f"got {got or 'alpha alone'}, expected factors of a weight {shape}"


def reject_other_models(
    path: pathlib.Path,
    entries: Mapping[str, TensorInfo],
    family: str | None = None,
    components: Container[str] = (),
) -> None:
    """InputError for tensors of a model, or of a LoRA for another than `family`.

    `components` are those of the model for which the LoRA should be; without a `family`, any that
    is supported will do.
    """
    if kind := kind_of_model(entries):
        raise InputError(f"{path}: got {kind}, expected a LoRA")
    expected = f"a LoRA for {family or SUPPORTED}"
    if other := unsupported_family(entries):
        raise InputError(
            f"{path}: got tensors for {other}, which is not supported, expected {expected}"
        )
    if family is None:
        return
    found = find_adapter(path, entries)
    networks = {UNET, TRANSFORMER} & (found.groups.keys() if found else set())
    got = found.family if found else UNKNOWN
    alike = got == UNKNOWN or got.startswith(family) or family.startswith(got)
    if any(each not in components or (each == TRANSFORMER and not alike) for each in networks):
        if got == UNKNOWN and UNET in networks and not any(map(_OF_UNETS.search, entries)):
            raise InputError(
                f"{path}: got names such as {min(entries)}, expected those of a LoRA for {family}"
            )
        if got == UNKNOWN:
            got = OF_UNETS if UNET in networks else OF_TRANSFORMERS
        raise InputError(f"{path}: got a LoRA for {got}, expected one for {family}")


def read_number(entry: TensorInfo) -> float:
    """The number in a tensor with one; raises InputError."""
    if math.prod(entry.shape) != 1:
        raise InputError(f"{entry.path}: {entry.name}: got {entry.shape}, expected one number")
    return float(read_tensor(entry).reshape(-1)[0])


class AdapterSettings:
    """PEFT's settings of the adapter file at `path`: beside it, or in its header; or none."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._settings: Mapping[str, Any] = {}
        if beside := settings_file(path):
            self._settings = read_object(beside)
        elif path.suffix == ".safetensors":
            text = read_metadata(path).get(METADATA, "{}")
            self._settings = parse_object(text.encode(), f"{path} ({METADATA})")
        for name, value in self._settings.items():
            start = name.rpartition(".")[2] == "init_lora_weights" and str(value).lower()
            if start and start.startswith(MOVED):
                raise InputError(
                    f"{path}: init_lora_weights: got {value!r}, with which the adapter fits other "
                    "weights, expected one that PEFT converted to a LoRA of the model's own"
                )

    def _get(self, component: str, name: str) -> Any:
        return self._settings.get(f"{component}.{name}", self._settings.get(name))

    def _pattern(self, component: str, name: str, module: str) -> Any:
        """The value of the first of the patterns `name` that `module` matches; None for none."""
        patterns = self._get(component, name)
        # transformers has dropped a prefix that our paths have.
        spellings = {module, module.removeprefix("text_model.")}
        for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
            if any(self._matches(name, pattern, each) for each in spellings):
                return value
        return None

    def _matches(self, name: str, pattern: str, module: str) -> bool:
        try:
            return re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error as error:
            raise InputError(
                f"{self._path}: {name}: got {pattern!r:.80} ({error}), "
                "expected a regular expression"
            ) from None

    def options(self, form: type[Change], component: str, module: str) -> dict[str, Any]:
        """Fields of a change of `form` that are settings; raises InputError."""
        try:
            return form.options(lambda name: self._get(component, name), module)
        except (ValueError, re.error) as error:
            raise InputError(f"{self._path}: {module}: got {error}") from None

    def scale(
        self, component: str, module: str, rank: int | None, alpha: TensorInfo | None
    ) -> float:
        """The scale alpha / rank, of the tensor `alpha`, or of the settings; 1 without either."""
        if alpha is not None:
            # An alpha of 0 stands for none, and one of nothing of a rank counts for nothing.
            scale = read_number(alpha) / rank or 1.0 if rank else 1.0
        else:
            scale = self._from_settings(component, module, rank)
        if not math.isfinite(scale):
            raise InputError(f"{self._path}: {module}: got the scale {scale}, expected a number")
        return scale

    def _from_settings(self, component: str, module: str, rank: int | None) -> float:
        alpha, r = self._get(component, "lora_alpha"), rank
        alpha = self._get(component, "alpha") if alpha is None else alpha  # of LoHa and LoKr
        if (own := self._pattern(component, "alpha_pattern", module)) is not None:
            alpha = own
        if r is None:
            r = self._pattern(component, "rank_pattern", module) or self._get(component, "r")
        if not all(isinstance(number, int | float) and number for number in (alpha, r)):
            return 1.0
        return alpha / (r**0.5 if self._get(component, "use_rslora") else r)


def reject_unsupported(path: pathlib.Path, names: Iterable[str]) -> None:
    """InputError that names the format of the first of `names` which is not supported."""
    names = sorted(names)
    if (name := control_tensor(names)) is not None:
        raise InputError(
            f"{path}: {name}: got a control LoRA of FLUX.1 (Canny or Depth), which widens the "
            "network's input and replaces norms, expected a LoRA that changes weights alone"
        )
    for name in names:
        if kind := unsupported(name):
            raise InputError(
                f"{path}: {name}: got {kind}, expected {', '.join(sorted(NAMES))} or DoRA"
            )


def reject_unknown_keys(
    path: pathlib.Path, what: str, names: Iterable[str], expected: str = "none"
) -> None:
    """InputError that lists `names`, if there are any, as `what` they are."""
    names = sorted(names)
    if names:
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise InputError(f"{path}: {what}: got {len(names)} ({shown}), expected {expected}")
