"""config.json files of components: what is structure and what only comes along.

diffusers' configs hold a class's constructor arguments and little else. transformers' configs
carry the settings of every model there is, from beam search to label names. What neither changes
the network nor is known here is an error: it may well change the network. `config_keys` lists them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxdiff.checkpoints.config_keys import DIFFUSERS_NO_EFFECT, TRANSFORMERS_NO_EFFECT, names
from jaxdiff.checkpoints.schedulers import CORRECTING_PIPELINES
from jaxdiff.core.configs import from_mapping, prefix_errors

C = TypeVar("C")

# Structure that CLIP does not have: fine as long as it says so.
ABSENT = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
}


def from_diffusers(cls: type[C], raw: Mapping[str, Any], *, source: str) -> C:
    """The dataclass of a diffusers component's config; InputError for a field not known here.

    Fields of former classes are fine with the values that the dataclass names as ABSENT.
    """
    absent: Mapping[str, Any] = getattr(cls, "ABSENT", {})
    known = {k: v for k, v in raw.items() if k not in absent or v != absent[k]}
    return _from(cls, known, names(DIFFUSERS_NO_EFFECT), source)


def from_transformers(cls: type[C], raw: Mapping[str, Any], *, source: str) -> C:
    """The dataclass of a CLIP tower's config; InputError for a field not known here."""
    known = {k: v for k, v in raw.items() if k not in ABSENT or v != ABSENT[k]}
    return _from(cls, known, names(TRANSFORMERS_NO_EFFECT), source)


def _from(cls: type[C], raw: Mapping[str, Any], foreign: frozenset[str], source: str) -> C:
    fields = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    known = {k: v for k, v in raw.items() if k in fields or k not in foreign}
    with prefix_errors(source):
        return from_mapping(cls, known, source=source)


def native_sample_size(
    raw: Mapping[str, Any], sample_size: int | tuple[int, ...] | None, pipeline_class: str
) -> int | tuple[int, ...] | None:
    """The side in latents that a UNet was trained at, by its config.json `raw`.

    Versions of diffusers before 0.9 wrote another default into the configs of models that were
    trained at 64; its pipelines of Stable Diffusion 1 and 2 read any number below 64 so.
    """
    version = re.match(r"(\d+)\.(\d+)", str(raw.get("_diffusers_version", "")))
    old = version is not None and tuple(map(int, version.groups())) < (0, 9)
    if old and pipeline_class in CORRECTING_PIPELINES and isinstance(sample_size, int):
        return max(sample_size, 64)
    return sample_size


def updated(
    raw: Mapping[str, Any], now: Mapping[str, Any], before: Mapping[str, Any]
) -> dict[str, Any]:
    """`raw` with the fields of `now` that differ from `before`, which `raw` stood for.

    A config that is saved again keeps what it left out and what only other programs read.
    """
    result = dict(raw)
    for name, value in now.items():
        if isinstance(value, Mapping):
            result[name] = updated(raw.get(name, {}), value, before.get(name, {}))
        elif name not in before or before[name] != value:
            result[name] = value
    return result
