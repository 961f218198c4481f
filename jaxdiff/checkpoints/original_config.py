"""The .yaml beside a single file: the config of the code that trained it (LDM, or Stability's sgm).

It is read with PyYAML's safe loader, which makes nothing but plain values. What its keys do:

| keys                                                       |                                     |
| ---------------------------------------------------------- | ----------------------------------- |
| `parameterization`, `denoiser_config`                      | the prediction type                 |
| `beta_schedule`, `linear_start`, `linear_end`, `timesteps` | the noise schedule                  |
| `scale_factor`                                             | the VAE's scaling factor            |
| `num_heads`, `num_head_channels` of the UNet               | heads of attention                  |
| ACCEPTED                                                   | other values are refused            |
| SHAPES, and those of the VAE                               | the tensors decide                  |
| `layer`, `layer_idx` of a text encoder                     | none: `clip_skip` chooses the layer |
| NO_EFFECT                                                  | none                                |

A key that is missing has the value of the model's family; but a whole config without
`parameterization` predicts noise. A key that is in no table is named in a warning. No jax here.
"""

import math
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxdiff.core.errors import InputError, os_error_message
from jaxdiff.core.text import decode_text

MAX_BYTES = 1_000_000
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}  # sgm's classes
BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
NETWORKS = ("unet_config", "network_config")
# Keys of the UNet that shapes of its tensors tell: the end of a name, and the axis.
SHAPES = {
    "in_channels": ("input_blocks.0.0.weight", 1),
    "out_channels": (".out.2.weight", 0),
    "model_channels": ("input_blocks.0.0.weight", 0),
    "context_dim": (".attn2.to_k.weight", 1),
}
# Keys of which only some values are implemented, by section.
ACCEPTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "params": {
        "conditioning_key": ("crossattn", "hybrid", None),
        "given_betas": (None,),
        "scale_by_std": (False, None),
        "use_positional_encodings": (False, None),
        "noise_aug_config": (None,),
        "cosine_s": (0.008, None),
    },
    "unet": {
        "use_scale_shift_norm": (False, None),
        "resblock_updown": (False, None),
        "use_spatial_transformer": (True,),
        "n_embed": (None,),
        "dims": (2,),
        "conv_resample": (True, None),
        "disable_self_attentions": (None,),
        "disable_middle_self_attn": (False, None),
        "num_heads_upsample": (-1, None),
        "num_head_channels": (64, -1, None),
        "num_classes": (None, "sequential"),
    },
    "ddconfig": {"double_z": (True,), "attn_type": ("vanilla", "vanilla-xformers", None)},
}
NO_EFFECT = {
    "params": (
        "unet_config network_config first_stage_config cond_stage_config conditioner_config "
        "denoiser_config scheduler_config optimizer_config loss_fn_config sampler_config "
        "network_wrapper num_timesteps_cond log_every_t first_stage_key cond_stage_key "
        "image_size channels cond_stage_trainable cond_stage_forward concat_mode monitor use_ema "
        "ema_decay_rate loss_type ckpt_path ignore_keys load_only_unet clip_denoised "
        "original_elbo_weight v_posterior l_simple_weight learn_logvar logvar_init make_it_fit "
        "ucg_training reset_ema reset_num_ema_updates finetune_keys concat_keys masked_image_key "
        "keep_finetune_dims c_concat_log_start c_concat_log_end force_null_conditioning "
        "unet_trainable disable_first_stage_autocast input_key log_keys "
        "no_cond_log compile_model en_and_decode_n_samples_a_time"
    ),
    "unet": (
        "image_size num_res_blocks attention_resolutions channel_mult transformer_depth "
        "adm_in_channels use_linear_in_transformer use_checkpoint use_fp16 use_bf16 legacy "
        "dropout use_new_attention_order num_attention_blocks spatial_transformer_attn_type "
        "transformer_depth_middle offload_to_cpu"
    ),
    "ddconfig": "z_channels resolution in_channels out_ch ch ch_mult num_res_blocks "
    "attn_resolutions dropout",
}
_COUNTS = {
    "params": "parameterization beta_schedule linear_start linear_end timesteps scale_factor",
    "unet": "num_heads",
    "ddconfig": "",
}
# Of text encoders: the layers that the families read anyway.
_LAYERS = (("last", None), ("penultimate", None), ("hidden", 11))


@dataclass(frozen=True, kw_only=True)
class OriginalConfig:
    """What a .yaml says that tensors do not; None where it says nothing."""

    path: pathlib.Path
    prediction_type: str | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # in keys of scheduler_config.json
    scaling_factor: float | None = None
    heads: int | None = None  # of attention in every stage, unless their width is given
    head_width: int | None = None
    shapes: Mapping[str, int] = field(default_factory=dict)  # numbers of SHAPES


def read_original_config(file: pathlib.Path) -> OriginalConfig | None:
    """The config in the .yaml beside a single file; None if there is none.

    Raises InputError, naming it, for one that is broken, or that asks for what is not here.
    """
    path = file.with_suffix(".yaml")
    if not path.is_file():
        return None
    root = _load(path)
    params = _section(path, root, "model", "params")
    if params is None:
        raise InputError(f"{path}: got no model.params, expected the config of {file.name}")
    network = next((name for name in NETWORKS if params.get(name)), None)
    unet = _section(path, params, network, "params") or {} if network else {}
    sections = {"params": params, "unet": unet}
    sections["ddconfig"] = _section(path, params, "first_stage_config", "params", "ddconfig") or {}
    for name, section in sections.items():
        _check(path, name, section)
    _check_layers(path, params)
    denoiser = _section(path, params, "denoiser_config", "params") or {}
    table = _section(path, denoiser, "discretization_config", "params") or {}
    return OriginalConfig(
        path=path,
        prediction_type=_prediction_type(path, params, denoiser, whole=network is not None),
        scheduler=_scheduler(path, dict(table) | dict(params)),
        scaling_factor=_number(path, params, "scale_factor"),
        heads=_count(path, unet, "num_heads"),
        head_width=_count(path, unet, "num_head_channels"),
        shapes={key: number for key in SHAPES if (number := _count(path, unet, key)) is not None},
    )


def _load(path: pathlib.Path) -> Any:
    import yaml  # few files have such a config

    try:
        with path.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: got {os_error_message(error)}, expected a config") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: got more than {MAX_BYTES} bytes, expected a config")
    text = decode_text(data, str(path))
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        why = str(error).split("\n")[0]
        raise InputError(f"{path}: got broken YAML ({why:.80}), expected a config") from None


def _section(path: pathlib.Path, root: Any, *names: str) -> Mapping[str, Any] | None:
    """The mapping below `names`; None if one of them is not there, InputError for another value."""
    for depth in range(len(names) + 1):
        if root is None:
            return None
        if not isinstance(root, Mapping):
            where = ".".join(names[:depth]) or "the file"
            raise InputError(f"{path}: {where}: got {root!r:.60}, expected keys with values")
        root = root.get(names[depth]) if depth < len(names) else root
    return root


def _check(path: pathlib.Path, name: str, section: Mapping[str, Any]) -> None:
    """InputError for a value that is not implemented; a warning for keys that are not known."""
    for key, accepted in ACCEPTED[name].items():
        if key in section and section[key] not in accepted:
            raise InputError(f"{path}: {key}: got {section[key]!r:.60}, expected {accepted[0]!r}")
    known = {*ACCEPTED[name], *NO_EFFECT[name].split(), *_COUNTS[name].split(), *SHAPES}
    if strange := sorted(str(key) for key in section if key not in known):
        warnings.warn(
            f"{path}: got the unknown keys {', '.join(strange)}, which have no effect", stacklevel=2
        )


def _text_encoders(params: Mapping[str, Any]) -> Iterator[Any]:
    yield params.get("cond_stage_config")
    conditioner = params.get("conditioner_config")
    inner = conditioner.get("params") if isinstance(conditioner, Mapping) else None
    listed = inner.get("emb_models") if isinstance(inner, Mapping) else None
    yield from listed if isinstance(listed, list) else ()


def _check_layers(path: pathlib.Path, params: Mapping[str, Any]) -> None:
    """A warning for a layer of a text encoder that is not read without being asked for."""
    for encoder in _text_encoders(params):
        own = encoder.get("params") if isinstance(encoder, Mapping) else None
        if not isinstance(own, Mapping):
            continue
        layer = own.get("layer", "last"), own.get("layer_idx")
        if layer not in _LAYERS:
            warnings.warn(
                f"{path}: got layer {layer[0]} {layer[1]} of a text encoder, which has no effect: "
                "clip_skip chooses the layer",
                stacklevel=2,
            )


def _prediction_type(
    path: pathlib.Path, params: Mapping[str, Any], denoiser: Mapping[str, Any], *, whole: bool
) -> str | None:
    scaling = _section(path, denoiser, "scaling_config")
    if scaling is not None:
        name = str(scaling.get("target")).rpartition(".")[2]
        if name not in SCALINGS:
            raise InputError(
                f"{path}: scaling_config: got {name:.60}, expected {', '.join(SCALINGS)}"
            )
        return SCALINGS[name]
    name = params.get("parameterization", "eps" if whole else None)
    if name is None:
        return None
    if str(name) not in PREDICTION_TYPES:
        raise InputError(
            f"{path}: parameterization: got {name!r:.60}, expected {', '.join(PREDICTION_TYPES)}"
        )
    return PREDICTION_TYPES[str(name)]


def _scheduler(path: pathlib.Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """The noise schedule in keys of scheduler_config.json."""
    found: dict[str, Any] = {}
    if (name := params.get("beta_schedule")) is not None:
        if str(name) not in BETAS:
            raise InputError(
                f"{path}: beta_schedule: got {name!r:.60}, expected {', '.join(BETAS)}"
            )
        found["beta_schedule"] = BETAS[str(name)]
    for key, ours in (("linear_start", "beta_start"), ("linear_end", "beta_end")):
        if (number := _number(path, params, key)) is not None:
            found[ours] = number
    if (steps := _count(path, params, "timesteps")) is not None:
        found["num_train_timesteps"] = steps
    return found


def _number(path: pathlib.Path, section: Mapping[str, Any], key: str) -> float | None:
    """A positive number; YAML takes 1e-4, without a point, for a text."""
    value = section.get(key)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf or isinstance(value, bool):
        raise InputError(f"{path}: {key}: got {value!r:.60}, expected a positive number")
    return number


def _count(path: pathlib.Path, section: Mapping[str, Any], key: str) -> int | None:
    value = section.get(key)
    if value in (None, -1):  # which stands for none
        return None
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {key}: got {value!r:.60}, expected a positive integer")
    return value
