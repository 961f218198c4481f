"""Names in LoRA files: the network, the module and the factor that each stands for.

| writer              | names                                                            |
| ------------------- | ---------------------------------------------------------------- |
| diffusers with PEFT | `unet.PATH.lora_A.weight`, `unet.PATH.lora_B.weight`             |
| its examples        | `unet.PATH.lora.down.weight`, `PATH.lora_linear_layer.up.weight` |
| diffusers before    | `BLOCK.attn1.processor.to_q_lora.down.weight`                    |
| PEFT by itself      | `base_model.model.PATH.lora_A.weight`                            |
| kohya, OneTrainer   | `lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight`, `.alpha`     |
| kohya's OFT         | `oft_unet_PATH_WITH_UNDERSCORES.oft_blocks`                      |
| LyCORIS, SimpleTuner | `lycoris_PATH_WITH_UNDERSCORES.lokr_w1`                         |
| ComfyUI, OneTrainer | `diffusion_model.PATH.lora_A.weight`,                            |
|                     | `text_encoders.clip_l.transformer.PATH.lora_A.weight`            |

Any of them may have the tensors of any format in `lora_formats`. ComfyUI's names count blocks as
the original layout does, and so do kohya's of SDXL.
"""

import pathlib
import re
from typing import NamedTuple

from jaxdiff.checkpoints import ldm_reader
from jaxdiff.checkpoints.lora_formats import BIASES, FORMATS, IA3, PEFT_ROLES, DoRA, LoRA
from jaxdiff.core.errors import InputError

# Names of a LoRA in a folder, the first that is there.
FILES = tuple(
    f"{stem}{ending}"
    for stem in ("pytorch_lora_weights", "adapter_model")
    for ending in (".safetensors", ".bin")
)
SETTINGS = "adapter_config.json"  # PEFT's, beside its adapter_model
COMPONENTS = ("text_encoder_2", "text_encoder", "unet")
PEFT, DIFFUSERS, KOHYA, LYCORIS, COMFY = "PEFT", "diffusers", "kohya", "LyCORIS", "ComfyUI"

# LoRA's own tensors are spelled in more than one way.
_ROLES = (
    (PEFT, re.compile(r"\.lora_A(\.\w+)?\.weight$"), "down"),
    (PEFT, re.compile(r"\.lora_B(\.\w+)?\.weight$"), "up"),
    (DIFFUSERS, re.compile(r"\.lora(_linear_layer)?\.down\.weight$"), "down"),
    (DIFFUSERS, re.compile(r"\.lora(_linear_layer)?\.up\.weight$"), "up"),
    (KOHYA, re.compile(r"\.alpha$"), "alpha"),
    *(
        (
            KOHYA if role in LoRA.tensors else PEFT if role in PEFT_ROLES else LYCORIS,
            re.compile(rf"\.{end}$"),
            role,
        )
        for tensors in (BIASES, DoRA.tensors, *(each.tensors for each in FORMATS))
        for role, end in tensors.items()
    ),
)
_OLD_ROLE = re.compile(r"(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_PREFIXES = (  # of modules with underscores for dots
    ("lora_unet_", KOHYA, "unet"),
    ("oft_unet_", KOHYA, "unet"),
    ("lora_te_", KOHYA, "text_encoder"),
    ("lora_te1_", KOHYA, "text_encoder"),
    ("lora_te2_", KOHYA, "text_encoder_2"),
    ("lycoris_", LYCORIS, None),
)
_COMFY = {
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
_BARE_TEXT = ("text_model.", "encoder.layers.", "text_model_", "encoder_layers_")
# Every part of a module's path in the networks of Stable Diffusion, longer ones first.
_PARTS = re.compile(
    r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block|transformer_blocks"
    r"|attentions|resnets|downsamplers|upsamplers|conv_in|conv_out|conv_shortcut|conv[12]?"
    r"|time_emb_proj|time_embedding|add_embedding|linear_[12]|time_embed|label_emb"
    r"|in_layers|out_layers|emb_layers|skip_connection|attn[12]|to_out|to_[qkv]|ff|net|proj_in"
    r"|proj_out|text_model|text_projection|encoder|layers|self_attn|[qkv]_proj|out_proj|mlp|fc[12]"
    r"|op|out|proj|\d+"
)
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.\d")
BLOCKS = 3  # numbered blocks in a stage of every published UNet


class Name(NamedTuple):
    """What one tensor of a LoRA file is."""

    spelling: str  # PEFT, DIFFUSERS, KOHYA, LYCORIS or COMFY
    component: str
    module: str  # its path; with underscores for dots where `flat`
    role: str  # "alpha", or a field of a class in `lora_formats`
    flat: bool = False


def parse(name: str) -> Name | None:
    """What a tensor is by its name; None for a name that no LoRA has."""
    name = name.replace(".processor.", ".")
    spelling, module, role = _role(name)
    if role is None:
        return None
    for prefix, writer, component in _PREFIXES:
        if module.startswith(prefix):
            module = module.removeprefix(prefix)
            return Name(writer, component or _component(module), module, role, flat=True)
    if role in IA3.tensors:  # the names of a network's own weights end so, too
        return None
    for prefix, component in _COMFY.items():
        if module.startswith(prefix):
            module = module.removeprefix(prefix).replace(".", "_")
            return Name(COMFY, component, module, role, flat=True)
    if module.startswith("base_model.model."):
        spelling, module = PEFT, module.removeprefix("base_model.model.")
    for component in COMPONENTS:
        if module.startswith(f"{component}."):
            return Name(spelling, component, module.removeprefix(f"{component}."), role)
    return Name(spelling, _component(module), module, role)


def _component(module: str) -> str:
    """The network of a module whose name does not say it."""
    return "text_encoder" if module.startswith(_BARE_TEXT) else "unet"


def _role(name: str) -> tuple[str, str, str | None]:
    """The spelling of a name, the module that it belongs to, and the role of its tensor."""
    if old := _OLD_ROLE.search(name):
        text = ".self_attn." in name
        last = _OLD_TEXT[old[1]] if text else {"to_out": "to_out.0"}.get(old[1], old[1])
        return DIFFUSERS, name[: old.start()] + last, old[2]
    for spelling, pattern, role in _ROLES:
        if pattern.search(name):
            return spelling, pattern.sub("", name), role
    return KOHYA, name, None


def unflatten_key(flat: str) -> str | None:
    """The path in diffusers or transformers that is written with underscores in `flat`.

    Underscores are ambiguous: the parts must be those of published networks. None for others.
    """
    parts = _PARTS.findall(flat)
    if not parts or "_".join(parts) != flat:
        return None
    path = ".".join(parts)
    if not _ORIGINAL.match(path):
        return path
    renamed = ldm_reader.unet_name(f"{path}.weight", BLOCKS).removesuffix(".weight")
    return None if renamed == path else renamed


def has_weights(folder: pathlib.Path) -> bool:
    """Whether a LoRA lies in `folder` under one of the names that libraries give it."""
    return any((folder / name).is_file() for name in FILES)


def weights_file(source: pathlib.Path) -> pathlib.Path:
    """The LoRA file at `source`, which is one or is a folder with one; raises InputError."""
    if not source.is_dir():
        return source
    for name in FILES:
        if (source / name).is_file():
            return source / name
    raise InputError(f"{source}: got no {FILES[0]}, expected a LoRA")


def settings_file(path: pathlib.Path) -> pathlib.Path | None:
    """PEFT's settings, which lie beside the file that it writes by itself."""
    beside = path.parent / SETTINGS
    return beside if path.stem == "adapter_model" and beside.is_file() else None


def path_and_scale(text: str) -> tuple[pathlib.Path, float]:
    """The parts of PATH or PATH:SCALE; the scale is 1 by default."""
    path, colon, scale = text.rpartition(":")
    try:
        return (pathlib.Path(path), float(scale)) if colon else (pathlib.Path(text), 1.0)
    except ValueError:
        return pathlib.Path(text), 1.0


def files(source: pathlib.Path) -> list[pathlib.Path]:
    """All that says what the LoRA at `source` is; raises InputError."""
    path = weights_file(source)
    settings = settings_file(path)
    return [path] if settings is None else [path, settings]
