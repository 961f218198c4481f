"""Tensors of whole checkpoints that no network here reads, and what they are. No jax here.

They are passed over, with one warning that counts them by kind. Those of kind SILENT are in most
files, and say nothing that is not known: tables of the noise schedule, ids of positions.
"""

import pathlib
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxdiff.checkpoints.safetensors import TensorInfo

SILENT = ""
# Of text encoders of which Stable Diffusion 2 reads the output of the last layer but one.
UNUSED = "a text encoder's last layer and projection"
DECODER = "T5's decoder"
EMA, PROJECTION, VISION = "averaged weights (EMA)", "text projections", "CLIP's image encoder"
_OF_VAES = {
    EMA: r"(model|encoder|decoder|quant)_ema\..+",
    "losses": r"loss\..+",
    SILENT: r"logvar",
}
# By class of the component, without its prefix in a single file.
_OF_CLASSES = {
    "UNet2DConditionModel": {EMA: r"model_ema\..+"},
    "AutoencoderKL": _OF_VAES,
    "VQModel": _OF_VAES,
    # without .weight it is OpenCLIP's, which every file of Stable Diffusion 2 has
    "CLIPTextModel": {PROJECTION: r"(text_model\.)?text_projection\.weight"},
    "CLIPTextModelWithProjection": {},
    "T5EncoderModel": {DECODER: r"decoder\..+|lm_head\.weight"},
}
_OF_CLIP = {
    SILENT: r"(.+\.)?(position_ids|logit_scale|attn_mask)",
    VISION: r"(vision_model|visual|visual_projection)\..+",
}
# Of single files, beside their components.
_OF_FILES = {
    SILENT: (
        r"betas|(sqrt_)?(one_minus_)?alphas_cumprod(_prev)?|log_one_minus_alphas_cumprod"
        r"|sqrt_(recip|recipm1|one_minus)_alphas_cumprod|posterior_\w+|scale_factor|logvar"
        r"|lvlb_weights|denoiser\..+|v_pred|ztsnr|(.+\.)?(position_ids|logit_scale)"
    ),
    EMA: r"model_ema\..+",
    "losses": r"(loss|loss_fn)\..+",
    PROJECTION: r"(cond_stage_model|conditioner\.embedders\.\d)\.text_projection(\.weight)?",
    "ControlNet": r"control_model\..+",
    "textual inversions in training": r"embedding_manager\..+",
    "training counters": r"global_step|epoch|iteration",
}


class FileTensors(NamedTuple):
    """The tensors of a single file by what they belong to."""

    groups: dict[str, dict[str, TensorInfo]]  # by prefix of the component, without it
    passed_over: list[str]  # kinds of those that are left over
    unknown: list[str]  # names


def sort_file(entries: Mapping[str, TensorInfo], classes: Mapping[str, str]) -> FileTensors:
    """The tensors of a single file whose components of `classes` lie below these prefixes."""
    found = FileTensors({prefix: {} for prefix in classes}, [], [])
    for name, entry in entries.items():
        prefix = next((p for p in classes if name.startswith(p)), None)
        own = name.removeprefix(prefix or "")
        kind = kind_in_file(name)
        if kind is None and prefix is not None:
            kind = kind_in_component(own, classes[prefix])
        if kind is not None:
            found.passed_over.append(kind)
        elif prefix is None:
            found.unknown.append(name)
        else:
            found.groups[prefix][own] = entry
    return found


def kind_in_component(name: str, class_name: str) -> str | None:
    """What a tensor of a component is that its network does not have; None if that is unknown."""
    table = _OF_CLASSES.get(class_name, {})
    return _kind(name, table | _OF_CLIP if class_name.startswith("CLIPText") else table)


def kind_in_file(name: str) -> str | None:
    """What a tensor of a single file is that belongs to no component; None if that is unknown."""
    return _kind(name, _OF_FILES)


def warn(source: str | pathlib.Path, kinds: Iterable[str]) -> None:
    """One warning that counts the tensors in `source` which are passed over."""
    if not (counts := count(kinds)):
        return
    # The place in the warning is that of the code which called this package.
    names = [f.f_globals.get("__name__", "") for f, _ in traceback.walk_stack(sys._getframe())]
    level = 1 + max(i for i, name in enumerate(names, 1) if name.partition(".")[0] == "jaxdiff")
    warnings.warn(f"{source}: got tensors that are not read: {listing(counts)}", stacklevel=level)


def count(kinds: Iterable[str]) -> dict[str, int]:
    """How many tensors are of each kind, without those of kind SILENT."""
    return dict(sorted(Counter(kind for kind in kinds if kind != SILENT).items()))


def listing(counts: Mapping[str, int]) -> str:
    """The kinds in words."""
    return ", ".join(f"{number} of {kind}" for kind, number in counts.items())


def shown(names: Iterable[str]) -> str:
    """How many names there are, and the first three."""
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _kind(name: str, table: dict[str, str]) -> str | None:
    return next((kind for kind, form in table.items() if re.fullmatch(form, name)), None)
