"""LoRA files in the spelling that diffusers and PEFT write today, or in kohya's.

In diffusers' spelling factors keep their values. Their scale, alpha / r, has no tensor there: it is
in the JSON in the file's header of which diffusers makes PEFT's settings, for each network `r`,
`lora_alpha` and, for modules that differ, `rank_pattern` and `alpha_pattern`.
"""

import dataclasses
import json
import pathlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxdiff.checkpoints.adapter_info import find_adapter
from jaxdiff.checkpoints.inversion_names import BUNDLED
from jaxdiff.checkpoints.key_tables import Rule
from jaxdiff.checkpoints.lora import (
    METADATA,
    AdapterSettings,
    reject_other_models,
    reject_unknown_keys,
    reject_unsupported,
)
from jaxdiff.checkpoints.lora_formats import kind_of
from jaxdiff.checkpoints.lora_names import (
    DIFFUSERS,
    T5,
    TRANSFORMER,
    UNET,
    has_weights,
    in_original_names,
    parse,
    unflatten_key,
    weights_file,
)
from jaxdiff.checkpoints.lora_products import LoRA
from jaxdiff.checkpoints.lora_targets import Roles, from_original, to_original
from jaxdiff.checkpoints.safetensors import (
    FLOAT8,
    LazyTensor,
    TensorInfo,
    numpy_dtype,
    read_metadata,
    read_tensor,
    write_tensors,
)
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.atomic import atomic_file, check_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, NDArray

NO_NAMES = "names of no LoRA for a published network"
Module = tuple[str, str]  # component, path of the module as in diffusers and transformers


class LoRAPair(NamedTuple):
    """One module's factors in PyTorch's layouts, and the scale of their product."""

    down: LazyTensor
    up: LazyTensor
    scale: float


def find_lora(source: pathlib.Path) -> pathlib.Path | None:
    """The LoRA file at `source`, a file or a folder; None where a model or nothing is.

    Raises InputError for a textual inversion.
    """
    if source.is_dir():
        pipeline = (source / "model_index.json").exists()
        return weights_file(source) if has_weights(source) and not pipeline else None
    if not source.is_file():
        return None
    addon = find_adapter(source, read_weights(source))
    if addon is not None and addon.layout != "LoRA":
        raise InputError(f"{source}: got a {addon.layout}, expected a model or a LoRA")
    return None if addon is None else source


def write_lora(
    target: pathlib.Path,
    source: pathlib.Path,
    *,
    dtype: Dtype | None = None,
    spelling: str = DIFFUSERS,
) -> int:
    """Write the LoRA file `source` in another spelling; returns the number of modules.

    `target` appears whole or not at all. `spelling` is "diffusers" or "kohya". `dtype` converts the
    factors, None keeps them. Raises InputError that lists what the spelling cannot hold.
    """
    modules = _modules(source)
    settings = AdapterSettings(source)
    pairs: dict[Module, LoRAPair] = {}
    for (component, module), roles in modules.items():
        scale = settings.scale(component, module, roles["down"].shape[0], roles.get("alpha"))
        down, up = (_lazy_tensor(roles[role], dtype) for role in ("down", "up"))
        pairs[component, module] = LoRAPair(down, up, scale)
    write = write_pairs if spelling == DIFFUSERS else write_kohya
    write(target, pairs, metadata=_training(source))
    return len(modules)


def write_pairs(
    target: pathlib.Path,
    pairs: Mapping[Module, LoRAPair],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write factors as a LoRA file in PEFT's spelling, with `metadata` in its header."""
    found: dict[str, LazyTensor] = {}
    ranks: dict[str, dict[str, int]] = defaultdict(dict)
    alphas: dict[str, dict[str, float]] = defaultdict(dict)
    for (component, module), pair in pairs.items():
        for factor, letter in ((pair.down, "A"), (pair.up, "B")):
            found[f"{component}.{module}.lora_{letter}.weight"] = factor
        # transformers has dropped this prefix; PEFT matches the ends of paths.
        place, rank = module.removeprefix("text_model."), pair.down.shape[0]
        ranks[component][place], alphas[component][place] = rank, pair.scale * rank
    settings: dict[str, Any] = {}
    for component, of in ranks.items():
        for name, value in _settings(of, alphas[component]).items():
            settings[f"{component}.{name}"] = value
    described = {METADATA: json.dumps(settings, indent=2, sort_keys=True)}
    check_file(target)
    with atomic_file(target) as temporary:
        write_tensors(temporary, found, metadata={**(metadata or {}), **described})


def write_kohya(
    target: pathlib.Path,
    pairs: Mapping[Module, LoRAPair],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write factors of a transformer as a LoRA file in kohya's spelling, as its trainer does.

    Modules that are one in the original code, such as queries, keys and values, get one pair: the
    `down` that all have, or theirs one below the other, of which each part's `up` reads its own.
    Raises InputError for a UNet, whose names differ from program to program.
    """
    if any(component == UNET for component, _ in pairs):
        raise InputError("format: got kohya for a LoRA of a UNet, expected diffusers")
    own = {module: pair for (component, module), pair in pairs.items() if component == TRANSFORMER}
    groups = to_original({m: (pair.down.shape, pair.up.shape) for m, pair in own.items()})
    lost = own.keys() - {name for _, parts in groups.values() for name in parts.values()}
    reject_unknown_keys(target, "modules that the original code has not", lost)
    found = {
        f"lora_unet_{_flat(original)}": _together(rule, {i: own[m] for i, m in parts.items()})
        for original, (rule, parts) in groups.items()
    }
    for (component, module), pair in pairs.items():
        if component != TRANSFORMER:
            t5 = module.startswith("encoder.block.")
            encoder = "te3" if t5 else "te2" if component == "text_encoder_2" else "te1"
            found[f"lora_{encoder}_{_flat(module)}"] = pair
    tensors: dict[str, LazyTensor] = {}
    for stem, pair in found.items():
        tensors |= {f"{stem}.lora_down.weight": pair.down, f"{stem}.lora_up.weight": pair.up}
        alpha = np.array(pair.scale * pair.down.shape[0], np.float32)
        tensors[f"{stem}.alpha"] = _stored(alpha)
    check_file(target)
    with atomic_file(target) as temporary:
        write_tensors(temporary, tensors, metadata=metadata or {})


def _together(rule: Rule, parts: Mapping[int, LoRAPair]) -> LoRAPair:
    """The factors of an original module with these parts; rows of others do not change."""
    first = next(iter(parts.values()))
    if len(rule.parts) == 1:
        return first._replace(up=_swapped(first.up)) if rule.swapped else first
    heights = rule.heights or (1,) * len(rule.parts)
    unit = next(len(_values(pair.up)) // heights[i] for i, pair in parts.items())
    begins = np.cumsum([0, *heights]) * unit
    scales = {pair.scale for pair in parts.values()}
    # Parts with other scales have them in `up`.
    factors = {i: 1.0 if len(scales) == 1 else pair.scale for i, pair in parts.items()}
    downs = {i: _values(pair.down) for i, pair in parts.items()}
    shared = len(scales) == 1 and all(
        np.array_equal(downs[i], _values(first.down)) for i in range(len(rule.parts)) if i in downs
    )
    shared = shared and len(parts) == len(rule.parts)
    down = _values(first.down) if shared else np.concatenate(list(downs.values()))
    up = np.zeros((begins[-1], len(down)), first.up.dtype)
    column = 0
    for i, pair in parts.items():
        rank = len(downs[i])
        rows = (factors[i] * _values(pair.up).astype(np.float32)).astype(up.dtype)
        up[begins[i] : begins[i + 1], column : column + rank] = rows
        column += 0 if shared else rank
    scale = first.scale if len(scales) == 1 else 1.0
    return LoRAPair(_stored(down), _stored(up), scale)


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _values(tensor: LazyTensor) -> NDArray:
    return tensor.fetch()


def _stored(values: NDArray) -> LazyTensor:
    return LazyTensor(dtype=values.dtype, shape=values.shape, fetch=lambda: values)


def _swapped(tensor: LazyTensor) -> LazyTensor:
    """The halves of the rows in the other order."""
    half = tensor.shape[0] // 2
    return dataclasses.replace(tensor, fetch=lambda: np.roll(tensor.fetch(), half, axis=0))


def _modules(path: pathlib.Path) -> dict[Module, Roles]:
    """The tensors of each module by role; raises for what PEFT's spelling cannot hold."""
    modules: dict[Module, dict[str, TensorInfo]] = defaultdict(dict)
    strange: list[str] = []
    entries = read_weights(path)
    _reject_other_formats(path, entries)
    for name, entry in entries.items():
        found = parse(name)
        module = found and (unflatten_key(found.module) if found.flat else found.module)
        if found is None or module is None:
            strange.append(name)
            continue
        bare = module == "text_projection" or module.startswith(("text_model.", "encoder.block."))
        if found.component.startswith("text_encoder") and not bare:
            module = f"text_model.{module}"
        if found.role in modules[found.component, module]:
            strange.append(name)
        modules[found.component, module][found.role] = entry
    if strange:
        reject_other_models(path, entries)
    reject_unknown_keys(path, NO_NAMES, strange)
    every = modules.values()
    reject_unknown_keys(
        path, "Tucker factors", [roles["mid"].name for roles in every if "mid" in roles]
    )
    reject_unknown_keys(
        path, "half of a pair", [_first(r) for r in every if not {"down", "up"} <= r.keys()]
    )
    reject_unknown_keys(
        path, "factors that do not go together", [_first(r) for r in every if not _pair(r)]
    )
    return _in_diffusers_names(path, modules)


def _in_diffusers_names(path: pathlib.Path, modules: Mapping[Module, Roles]) -> dict[Module, Roles]:
    """The factors of each module of diffusers, some of which are one in the original code."""
    own = {module: r for (component, module), r in modules.items() if component == TRANSFORMER}
    found: dict[Module, Roles] = {m: r for m, r in modules.items() if m[0] != TRANSFORMER}
    twice, unknown = [], []
    for module, roles in from_original(own):
        if in_original_names(module):
            unknown.append(roles["up"].name)
        elif (TRANSFORMER, module) in found:
            twice.append(roles["up"].name)
        found[TRANSFORMER, module] = roles
    reject_unknown_keys(path, NO_NAMES, unknown)
    reject_unknown_keys(path, "factors of modules that have others", twice)
    return found


def _reject_other_formats(path: pathlib.Path, entries: Mapping[str, TensorInfo]) -> None:
    """InputError for tensors that are those of something else than a LoRA."""
    reject_unsupported(path, entries)
    others: dict[str, list[str]] = defaultdict(list)  # names by what they are of
    for name, entry in entries.items():
        found = parse(name)
        if name.startswith(BUNDLED):
            others["textual inversions"].append(name)
        elif found is not None and found.component == T5:
            others["a LoRA of T5"].append(name)
        elif found is not None and found.role not in (*LoRA.tensors, "alpha"):
            others[kind_of({found.role: entry.shape})].append(name)
    for kind, names in sorted(others.items()):
        reject_unknown_keys(
            path,
            f"{kind}, which a LoRA file of diffusers cannot hold (jaxdiff loads the file as it is)",
            names,
        )


def _first(roles: Mapping[str, TensorInfo]) -> str:
    return next(iter(roles.values())).name


def _pair(roles: Mapping[str, TensorInfo]) -> bool:
    """Whether the factors are those of a linear layer or of a convolution."""
    down, up = roles["down"].shape, roles["up"].shape
    return (
        len(down) == len(up) and len(down) in (2, 4) and 0 < down[0] == up[1] and set(up[2:]) <= {1}
    )


def _lazy_tensor(entry: TensorInfo, dtype: Dtype | None) -> LazyTensor:
    stored = ml_dtypes.bfloat16 if entry.dtype in FLOAT8 else numpy_dtype(entry)
    wanted = np.dtype(stored if dtype is None else dtype)
    return LazyTensor(
        dtype=wanted, shape=entry.shape, fetch=lambda: read_tensor(entry).astype(wanted, copy=False)
    )


def _settings(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """PEFT's settings of one network: what most modules have, and which have something else."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(m, ranks): own for m, own in ranks.items() if own != rank},
        "alpha_pattern": {_pattern(m, ranks): own for m, own in alphas.items() if own != alpha},
        "target_modules": sorted(ranks),
    }


def _pattern(module: str, modules: Iterable[str]) -> str:
    """The pattern of a module, which PEFT matches with the ends of paths unless it has a start."""
    return f"^{module}" if any(other.endswith(f".{module}") for other in modules) else module


def _training(path: pathlib.Path) -> dict[str, str]:
    """What kohya's trainer says of its training in a file's header."""
    texts = read_metadata(path) if path.suffix == ".safetensors" else {}
    return {name: text for name, text in texts.items() if name.startswith("ss_")}
