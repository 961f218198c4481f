"""Spellings of tensor names that differ between versions of diffusers and transformers.

Canonical are diffusers' present names, and transformers' with the `text_model.` or `vision_model.`
prefix: transformers wrote it in every version before 5.6 and reads it in all of them.
"""

import re
from collections.abc import Collection

# A buffer that old transformers saved; it holds 0, 1, 2, ...
_BUFFER = re.compile(r"(^|\.)position_ids$")
_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.")
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# By class: second names of weights, and the first ones.
TIED = {"T5EncoderModel": {"encoder.embed_tokens.weight": "shared.weight"}}
_BARE_CLIP = re.compile(r"(embeddings|encoder|final_layer_norm|pre_layrnorm|post_layernorm)\.")


def canonical(name: str, *, class_name: str) -> str | None:
    """The name of a stored tensor as the rule table knows it; None for a buffer to be ignored.

    `class_name` is the diffusers or transformers class of the component.
    """
    if class_name.startswith("CLIP"):
        if _BUFFER.search(name):
            return None
        if _BARE_CLIP.match(name):
            prefix = "vision_model" if "Vision" in class_name else "text_model"
            return f"{prefix}.{name}"
    if class_name == "MultilingualCLIP" and _BUFFER.search(name):
        return None
    if tied := TIED.get(class_name, {}).get(name):
        return tied
    if class_name in ("AutoencoderKL", "VQModel"):
        # diffusers before 0.17
        return _OLD_ATTENTION.sub(lambda m: f"{m[1]}{NEW_ATTENTION[m[2]]}.", name)
    return name


def without_ties(names: Collection[str], *, class_name: str) -> list[str]:
    """`names` of stored tensors without the second names of those that are there twice."""
    tied = TIED.get(class_name, {})
    return [name for name in names if tied.get(name) not in names]
