"""The table of config keys: what the readers make of it, and what docs/checkpoints.md shows."""

import dataclasses
import pathlib
import re

import pytest

from jaxdiff.checkpoints.config_keys import (
    DIFFUSERS_NO_EFFECT,
    EDM_KEYS,
    SCHEDULER_KEYS,
    TRANSFORMERS_NO_EFFECT,
    component_keys,
    names,
)
from jaxdiff.checkpoints.model_registry import MODEL_CLASSES
from jaxdiff.checkpoints.schedulers import SCHEDULERS, SchedulerOptions, schedule_of
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import EDMSchedule, FlowSchedule, VPSchedule

DOCS = pathlib.Path(__file__).parents[2] / "docs/checkpoints.md"
# one class of each config
COMPONENTS = {k.config: k.name for k in reversed(MODEL_CLASSES.values()) if k.config is not None}


def listed(keys):
    return ", ".join(f"`{key}`" for key in sorted(keys))


def value(accepted):
    return "null" if accepted is None else str(accepted).lower()


def tables():
    """The tables of docs/checkpoints.md."""
    rows = ["| key | | |", "|---|---|---|"]
    for key, effect in sorted(SCHEDULER_KEYS.items()):
        unless = ", ".join(f"`{value(each)}`" for each in effect.accepted)
        kind = f"refused unless {unless}" if unless else effect.kind
        rows.append(f"| `{key}` | {kind} | {effect.text} |")
    rows += ["", "| config of | no effect | why |", "|---|---|---|"]
    for cls, name in reversed(COMPONENTS.items()):
        for key, effect in component_keys(cls).items():
            if effect.kind == "no effect":
                rows.append(f"| {name} | `{key}` | {effect.text} |")
    for library, reasons in (
        ("diffusers' networks", DIFFUSERS_NO_EFFECT),
        ("transformers' networks", TRANSFORMERS_NO_EFFECT),
    ):
        rows += [f"| {library} | {listed(keys.split())} | {why} |" for why, keys in reasons.items()]
    return "\n".join(rows)


def test_the_docs_show_the_tables():
    """If this fails: write what `tables()` returns between the marks in docs/checkpoints.md."""
    shown = re.search(r"<!-- config keys -->\n(.*)\n<!-- end -->", DOCS.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == tables()


@pytest.mark.parametrize("key", [k for k, effect in SCHEDULER_KEYS.items() if effect.accepted])
def test_other_values_of_such_keys_are_refused(key):
    for accepted in SCHEDULER_KEYS[key].accepted:
        SchedulerOptions.from_config({key: accepted})
    with pytest.raises(InputError, match=rf"^scheduler_config\.json: {key}: got 'odd', expected"):
        SchedulerOptions.from_config({key: "odd"})


def test_keys_that_count_are_those_that_are_read():
    """Fields of schedules and options, and what chooses among samplers."""
    classes = (VPSchedule, FlowSchedule, EDMSchedule, SchedulerOptions)
    read = {field.name for cls in classes for field in dataclasses.fields(cls)}
    read |= {key for each in SCHEDULERS.values() for options in each.values() for key in options}
    read |= {"prediction_type", "rescale_betas_zero_snr"}
    read |= {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
    read |= {"thresholding", "dynamic_thresholding_ratio", "sample_max_value"}
    read |= {"clip_sample", "clip_sample_range"}
    read -= {"zero_terminal_snr", "time_scale", "path", *EDM_KEYS}
    assert read == {k for k, effect in SCHEDULER_KEYS.items() if effect.kind == "counts"}
    assert schedule_of({"rescale_betas_zero_snr": True}) == VPSchedule(zero_terminal_snr=True)


def test_reasons_name_each_key_once():
    for reasons in (DIFFUSERS_NO_EFFECT, TRANSFORMERS_NO_EFFECT):
        assert len(names(reasons)) == sum(len(keys.split()) for keys in reasons.values())
