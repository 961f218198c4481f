"""Tensors of whole checkpoints that no network here reads, and what they are. No jax here.

They are passed over, with one warning that counts them by kind. Those of kind SILENT are in most
files, and say nothing that is not known: tables of the noise schedule, ids of positions.
"""

import pathlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable

SILENT = ""
EMA, PROJECTION, VISION = "averaged weights (EMA)", "text projections", "CLIP's image encoder"
# By class of the component, without its prefix in a single file.
_OF_CLASSES = {
    "UNet2DConditionModel": {EMA: r"model_ema\..+"},
    "AutoencoderKL": {EMA: r"model_ema\..+", "losses": r"loss\..+"},
    # without .weight it is OpenCLIP's, which every file of Stable Diffusion 2 has
    "CLIPTextModel": {PROJECTION: r"(text_model\.)?text_projection\.weight"},
    "CLIPTextModelWithProjection": {},
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


def kind_in_component(name: str, class_name: str) -> str | None:
    """What a tensor of a component is that its network does not have; None if that is unknown."""
    table = _OF_CLASSES.get(class_name, {})
    return _kind(name, table | _OF_CLIP if class_name.startswith("CLIPText") else table)


def kind_in_file(name: str) -> str | None:
    """What a tensor of a single file is that belongs to no component; None if that is unknown."""
    return _kind(name, _OF_FILES)


def warn(source: str | pathlib.Path, kinds: Iterable[str]) -> None:
    """One warning that counts the tensors in `source` which are passed over."""
    counts = Counter(kind for kind in kinds if kind != SILENT)
    if counts:
        listed = ", ".join(f"{counts[kind]} of {kind}" for kind in sorted(counts))
        warnings.warn(f"{source}: got tensors that are not read: {listed}", stacklevel=3)


def _kind(name: str, table: dict[str, str]) -> str | None:
    return next((kind for kind, form in table.items() if re.fullmatch(form, name)), None)
