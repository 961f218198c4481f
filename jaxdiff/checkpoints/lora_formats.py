"""Formats of adapters: what each changes in a weight W, (o, i) or (o, i, h, w) as in PyTorch.

| format   | change of W, before the scale                        | source              |
| -------- | ---------------------------------------------------- | ------------------- |
| LoRA     | up @ down; Tucker's core between them                | 2106.09685, LyCORIS |
| LoHa     | (w1_a @ w1_b) * (w2_a @ w2_b)                        | 2108.06098, LyCORIS |
| LoKr     | kron(w1, w2)                                         | LyCORIS             |
| GLoRA    | b1 @ b2 + W @ a1 @ a2                                | 2306.07967, LyCORIS |
| (IA)^3   | W * v by rows or columns; PEFT stores 1 + v          | 2205.05638, LyCORIS |
| OFT      | R W - W, R of orthogonal blocks; PEFT: W R - W       | 2306.07280, LyCORIS |
| BOFT     | R_m ... R_1 W - W, blocks of a butterfly             | 2311.06243, LyCORIS |
| full     | a difference                                         | LyCORIS             |
| DoRA     | g V / |V| - W, V changed by another format           | 2402.09353, LyCORIS |

The scale of an adapter multiplies the whole change. At 0 the model is itself, and changes add up.
"""

import re
from collections.abc import Iterable, Mapping

from jaxdiff.checkpoints.lora_change import Change, Difference, Shape
from jaxdiff.checkpoints.lora_products import GLoRA, LoHa, LoKr, LoRA
from jaxdiff.checkpoints.lora_rotations import BOFT, OFT, PeftOFT
from jaxdiff.checkpoints.lora_scalings import IA3, DoRA, PeftIA3

FORMATS: tuple[type[Change], ...] = (
    LoRA,
    LoHa,
    LoKr,
    GLoRA,
    OFT,
    BOFT,
    PeftOFT,
    PeftIA3,
    Difference,
    IA3,  # its `.weight` is the end of others' names
)
BIASES = {"diff_b": "(diff_b|b_norm)", "lora_bias": r"lora_B(\.\w+)?\.bias"}
PEFT_ROLES = frozenset({"magnitude", "lora_bias", *PeftIA3.tensors, *PeftOFT.tensors})
# Names of tensors of other formats, which are refused.
UNSUPPORTED = {
    "embedding factors": r"\.(lora|oft)_embedding_\w+",
    "AdaLoRA": r"\.(lora_E|ranknum)\b",
    "VeRA": r"\.(vera_lambda_[bd]|vera_[AB])\b",
    "BOFT of PEFT": r"\.boft_[RsP]\b",
    "GLoRA of PEFT": r"\.glora_[A-E]\b",
    "Tucker factors of LoKr": r"\.lokr_t1$",
    "OFT of old LyCORIS": r"\.oft_diag$",
    "weights in place of the model's": r"\.(set_weight|reshape_weight)$|\.modules_to_save\b",
    "ControlNet-LLLite": r"^lllite_",
}

# Norms that the control LoRAs of FLUX.1 (Canny, Depth) have in place of the model's.
_CONTROL = re.compile(r"\.(query|key)_norm\.scale$|\.norm_(added_)?[qk]\.weight$")


def control_tensor(names: Iterable[str]) -> str | None:
    """The first tensor with which a LoRA is a control LoRA of FLUX.1; None for others."""
    names = sorted(names)
    if not any(".lora_A." in name for name in names):
        return None
    return next((name for name in names if _CONTROL.search(name)), None)


def format_of(shapes: Mapping[str, Shape]) -> type[Change] | None:
    """The format of a module's tensors, by field; None if they belong to none or to several."""
    return next((each for each in FORMATS if each.matches(shapes)), None)


def kind_of(shapes: Mapping[str, Shape]) -> str:
    """What to call a module's tensors, also where some are missing."""
    form = format_of(
        {r: s for r, s in shapes.items() if r not in ("alpha", *DoRA.tensors, *BIASES)}
    )
    form = form or next((each for each in FORMATS if shapes.keys() & each.tensors.keys()), None)
    if shapes.keys() & DoRA.tensors.keys():
        return DoRA.name if form in (LoRA, None) else f"{form.name} with {DoRA.name}"
    return Difference.name if form is None else form.name


def unsupported(name: str) -> str | None:
    """The format, which is not supported, of a tensor of this name; None if it has no such."""
    return next((kind for kind, form in UNSUPPORTED.items() if re.search(form, name)), None)
