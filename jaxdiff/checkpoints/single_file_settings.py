"""What a single file says of its model beside the weights, and which of its sayings counts.

The order of authority: what the user asks for, then tensors, then the .yaml beside the file, then
notes in its header, then what is usual in the family. Where two of them differ a warning says so.
No jax here.
"""

import math
import pathlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.checkpoints.layout_registry import layout_of
from jaxdiff.checkpoints.original_config import SHAPES, OriginalConfig, read_original_config
from jaxdiff.checkpoints.prediction_type import stored_prediction_type
from jaxdiff.checkpoints.safetensors import FLOAT8, TensorInfo, read_metadata, read_tensor
from jaxdiff.checkpoints.single_file_layouts import SingleFileLayout
from jaxdiff.core.errors import InputError

METADATA_KEY = "modelspec.prediction_type"  # in the header, as the ModelSpec standard calls it
# The words of the standard that are not ours, and what is written for flows.
NOTES = {"v": "v_prediction", "flow": "flow_prediction"}
BETAS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "trained_betas")
SHIFTS = ("shift", "use_dynamic_shifting", "base_shift", "max_shift")
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # tensors that mark a file; their values count nothing
ALPHAS_CUMPROD, SCALE_FACTOR = "alphas_cumprod", "scale_factor"

Entries = Mapping[str, TensorInfo]


class Claim(NamedTuple):
    """Something that is said about a file's model; None if nothing is."""

    source: str
    value: Any


def read_layout(
    path: pathlib.Path, entries: Entries, prediction_type: str | None = None
) -> SingleFileLayout:
    """The layout of a single file, with all that it says of its model beside the weights.

    `prediction_type` is what the user asks for. Raises InputError for a file of no known layout,
    and for one whose .yaml is broken or asks for what is not here.
    """
    config = read_original_config(path)
    beside = "" if config is None else config.path.name
    predicts = _settle(
        f"{path}: prediction_type",
        Claim("as asked for", prediction_type),
        Claim(f"tensor {V_PREDICTION}", "v_prediction" if V_PREDICTION in entries else None),
        Claim(beside, config and config.prediction_type),
        Claim(METADATA_KEY, _noted(path)),
    )
    layout = layout_of(entries, predicts)
    scheduler = dict(layout.scheduler)
    flow = stored_prediction_type(scheduler) == "flow_prediction"
    if flow and predicts not in (None, "flow_prediction"):
        raise InputError(f"{path}: prediction_type: got {predicts}, expected flow_prediction")
    if predicts is not None and not flow:
        scheduler["prediction_type"] = predicts
    if config is not None:
        scheduler |= config.scheduler
        layout = _with_heads(layout, config)
        _check_shapes(path, entries, config)
    factor = _settle(
        f"{path}: scaling factor of the VAE",
        Claim(f"tensor {SCALE_FACTOR}", _scale_factor(entries, layout.scaling_factor)),
        Claim(beside, config and config.scaling_factor),
    )
    if ZERO_SNR in entries or _ends_in_noise(entries):
        scheduler["rescale_betas_zero_snr"] = True
    layout = replace(layout, scheduler=scheduler)
    if layout.vae is None:
        return layout
    return _with_field(layout, layout.vae, "scaling_factor", factor or layout.scaling_factor)


def marker_tensors(scheduler: Mapping[str, Any], usual: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that say where a `scheduler` differs from what is `usual` in the family.

    A warning names what no file of this layout can say.
    """
    counting = SHIFTS if scheduler.get("use_dynamic_shifting") else SHIFTS[:2]
    for key in (*BETAS, *counting):
        if key in scheduler and scheduler[key] not in (usual.get(key), None):
            warnings.warn(
                f"{key}: got {scheduler[key]!r:.60}, expected {usual.get(key)!r}: a single file "
                "does not say so",
                stacklevel=2,
            )
    predicts = stored_prediction_type(scheduler)
    velocity = predicts == "v_prediction" != stored_prediction_type(usual)
    zero_snr = bool(scheduler.get("rescale_betas_zero_snr"))
    return (*((V_PREDICTION,) if velocity else ()), *((ZERO_SNR,) if zero_snr else ()))


def _settle(what: str, *claims: Claim) -> Any:
    """The value that is claimed with the most authority; a warning if another claim differs."""
    made = [claim for claim in claims if claim.value is not None]
    if not made:
        return None
    value = made[0].value
    if others := [claim for claim in made if claim.value != value]:
        listed = ", ".join(f"{claim.value} ({claim.source})" for claim in others)
        warnings.warn(
            f"{what}: got {value} ({made[0].source}) and {listed}: the first counts", stacklevel=3
        )
    return value


def _noted(path: pathlib.Path) -> str | None:
    """The prediction type that the header of a safetensors file names."""
    if path.suffix != ".safetensors":
        return None
    noted = read_metadata(path).get(METADATA_KEY)
    return NOTES.get(noted, noted) if noted else None


def _with_heads(layout: SingleFileLayout, config: OriginalConfig) -> SingleFileLayout:
    """The layout with the heads of attention that the .yaml gives, if it gives any."""
    if config.head_width is not None:
        return _with_field(layout, "unet", "attention_head_dim", None)
    if config.heads is not None:
        return _with_field(layout, "unet", "attention_head_dim", config.heads)
    return layout


def _with_field(layout: SingleFileLayout, name: str, key: str, value: Any) -> SingleFileLayout:
    """The layout with a field of a component's config; None: the shapes tell it."""
    own = {k: v for k, v in {**layout.fields.get(name, {}), key: value}.items() if v is not None}
    return replace(layout, fields={**layout.fields, name: own})


def _check_shapes(path: pathlib.Path, entries: Entries, config: OriginalConfig) -> None:
    """A warning for numbers in the .yaml that the tensors contradict."""
    for key, number in config.shapes.items():
        end, axis = SHAPES[key]
        shape = next((e.shape for name, e in entries.items() if name.endswith(end)), ())
        if len(shape) > axis:
            _settle(
                f"{path}: {key}", Claim("tensors", shape[axis]), Claim(config.path.name, number)
            )


def _scale_factor(entries: Entries, usual: float) -> float | None:
    """The number that a training measured and left in the file, perhaps rounded since."""
    entry = entries.get(SCALE_FACTOR)
    if entry is None:
        return None
    if entry.shape not in ((), (1,)):
        raise InputError(f"{entry.path}: {entry.name}: got {entry.shape}, expected one number")
    factor = float(read_tensor(entry).reshape(-1)[0])
    if not 0 < factor < math.inf:
        raise InputError(f"{entry.path}: {entry.name}: got {factor}, expected a positive number")
    rounding = 0.07 if entry.dtype in FLOAT8 else 1e-3
    return usual if math.isclose(factor, usual, rel_tol=rounding) else factor


def _ends_in_noise(entries: Entries) -> bool:
    """Whether the file's table of the noise schedule has a zero terminal SNR."""
    entry = entries.get(ALPHAS_CUMPROD)
    if entry is None or len(entry.shape) != 1 or entry.shape[0] < 2:
        return False
    table = read_tensor(entry).astype(np.float64)
    return bool(table[0] > 0.5 and abs(table[-1]) < 1e-6)
