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
| ComfyUI, OneTrainer, | `diffusion_model.PATH.lora_A.weight`,                           |
| ai-toolkit          | `text_encoders.clip_l.transformer.PATH.lora_A.weight`            |
| XLabs               | `double_blocks.0.processor.qkv_lora1.down.weight`                |

Any of them may have the tensors of any format in `lora_formats`. ComfyUI's names are those of the
original layout, and so are kohya's of SDXL, SD3 and FLUX.1. diffusers' transformers begin with
`transformer.` (OneTrainer: `lora_transformer_`).
"""

import pathlib
import re
from typing import NamedTuple

from jaxdiff.checkpoints import ldm_reader
from jaxdiff.checkpoints.lora_formats import BIASES, FORMATS, PEFT_ROLES
from jaxdiff.checkpoints.lora_products import LoRA
from jaxdiff.checkpoints.lora_scalings import IA3, DoRA
from jaxdiff.core.errors import InputError

# Names of a LoRA in a folder, the first that is there.
FILES = tuple(
    f"{stem}{ending}"
    for stem in ("pytorch_lora_weights", "adapter_model")
    for ending in (".safetensors", ".bin")
)
SETTINGS = "adapter_config.json"  # PEFT's, beside its adapter_model
UNET, TRANSFORMER = "unet", "transformer"
COMPONENTS = ("text_encoder_3", "text_encoder_2", "text_encoder", UNET, TRANSFORMER)
T5 = "T5"  # a component whose name depends on the family
PEFT, DIFFUSERS, KOHYA, LYCORIS, COMFY = "PEFT", "diffusers", "kohya", "LyCORIS", "ComfyUI"
XLABS = "XLabs"

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
_OLD_ROLE = re.compile(r"(to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora\.(down|up)\.weight$")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_PREFIXES = (  # of modules with underscores for dots; None: what the module's name begins with
    ("lora_unet_", KOHYA, None),
    ("oft_unet_", KOHYA, None),
    ("lora_transformer_", KOHYA, TRANSFORMER),
    ("lora_te_", KOHYA, "text_encoder"),
    ("lora_te1_", KOHYA, "text_encoder"),
    ("lora_te2_", KOHYA, "text_encoder_2"),
    ("lora_te3_", KOHYA, T5),
    ("lycoris_", LYCORIS, None),
)
_COMFY = {
    "diffusion_model.": None,
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": T5,
}
# How modules begin, with dots or underscores.
_BARE = {
    "text_encoder": re.compile(r"(text_model|encoder[._]layers)[._]"),
    T5: re.compile(r"encoder[._]block[._]"),
    TRANSFORMER: re.compile(
        r"((single_)?transformer_blocks|(double|single|joint)_blocks)[._]\d"
        r"|(x_embedder|context_embedder|pos_embed|time_text_embed|norm_out|proj_out|img_in|txt_in"
        r"|time_in|vector_in|guidance_in|t_embedder|y_embedder|final_layer"
        r"|distilled_guidance_layer)([._]|$)"
    ),
}
_XLABS = re.compile(  # 1 is the stream of the image, 2 that of the text
    r"(diffusion_model\.)?(?P<block>(double|single)_blocks\.\d+)\.processor\."
    r"(?P<layer>qkv|proj)_lora(?P<stream>[12]?)\.(?P<role>down|up)\.weight"
)
# Every part of a module's path in published networks, longer ones first.
_PARTS = re.compile(
    r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block"
    r"|(?:single_)?transformer_blocks|(?:double|single|joint)_blocks|(?:x|context)_block"
    r"|attentions|resnets|downsamplers|upsamplers|conv_in|conv_out|conv_shortcut|conv[12]?"
    r"|time_emb_proj|time_embedding|add_embedding|linear_[12]|time_embed|label_emb"
    r"|time_text_embed|(?:timestep|guidance|text|context|x|t|y)_embedder|pos_embed"
    r"|in_layers|out_layers|emb_layers|skip_connection|attn[12]?|to_out|to_add_out|to_[qkv]"
    r"|add_[qkv]_proj|ff(?:_context)?|net|norm1_context|norm_out|norm1?|proj_in|proj_out|proj_mlp"
    r"|(?:img|txt)_(?:attn|mlp|mod|in)|(?:time|vector|guidance)_in|(?:in|out)_layer|qkv"
    r"|modulation|linear[12]?|lin|final_layer|adaLN_modulation|distilled_guidance_layer"
    r"|in_proj|norms|text_model|text_projection|encoder|layers|self_attn|[qkv]_proj|out_proj|mlp|fc[12]"
    r"|op|out|proj|\d+"
)
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.\d")
_ORIGINAL_TRANSFORMER = re.compile(
    r"((double|single|joint)_blocks|img_in|txt_in|(time|vector|guidance)_in|[ty]_embedder"
    r"|final_layer|x_embedder\.proj|distilled_guidance_layer\.layers\.\d+\.(in|out)_layer)(\.|$)"
)
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
    if match := _XLABS.fullmatch(name):
        return Name(XLABS, TRANSFORMER, _xlabs_module(match), match["role"])
    name = name.replace(".processor.", ".")
    spelling, module, role = _role(name)
    if role is None:
        return None
    for prefix, writer, component in _PREFIXES:
        if module.startswith(prefix):
            module = module.removeprefix(prefix)
            return Name(writer, _component(module, component), module, role, flat=True)
    if role in IA3.tensors:  # the names of a network's own weights end so, too
        return None
    for prefix, component in _COMFY.items():
        if module.startswith(prefix):
            module = module.removeprefix(prefix).replace(".", "_")
            return Name(COMFY, _component(module, component), module, role, flat=True)
    if module.startswith("base_model.model."):
        spelling, module = PEFT, module.removeprefix("base_model.model.")
    for component in COMPONENTS:
        if module.startswith(f"{component}."):
            return Name(spelling, component, module.removeprefix(f"{component}."), role)
    return Name(spelling, _component(module), module, role)


def _component(module: str, stated: str | None = None) -> str:
    """The network of a module below a prefix that has `stated` it, or not."""
    if stated in (None, "text_encoder_2"):  # the second text encoder may be T5
        own = (name for name, form in _BARE.items() if form.match(module))
        found = next(own, UNET)
        return found if stated is None or found == T5 else stated
    return stated


def _xlabs_module(match: re.Match[str]) -> str:
    """The layer that XLabs' attention processor changes, in the original names.

    That of the queries, keys and values of a single block, which are rows of its first layer, is
    called `qkv`.
    """
    block, layer = match["block"], match["layer"]
    if block.startswith("single"):
        return f"{block}.{'qkv' if layer == 'qkv' else 'linear2'}"
    return f"{block}.{'txt' if match['stream'] == '2' else 'img'}_attn.{layer}"


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


def in_original_names(module: str) -> bool:
    """Whether a path in a transformer is one of the original code, not of diffusers."""
    return _ORIGINAL_TRANSFORMER.match(module) is not None


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
