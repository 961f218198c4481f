"""config.json files of components: what is structure and what only comes along.

diffusers' configs hold a class's constructor arguments and little else. transformers' configs
carry the settings of every model there is, from beam search to label names. What neither changes
the network nor is known here is an error: it may well change the network.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxdiff.checkpoints.schedulers import CORRECTING_PIPELINES
from jaxdiff.core.configs import from_mapping, prefix_errors

C = TypeVar("C")

# fmt: off
# Settings of transformers' PretrainedConfig, any version, that leave a CLIP tower as it is.
_TRANSFORMERS = frozenset({
    "architectures", "attention_dropout", "attn_implementation", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dropout", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_factor",
    "initializer_range", "label2id", "length_penalty", "logit_scale_init_value", "max_length",
    "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
    "pad_token_id", "prefix", "problem_type", "projection_dim", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})
# Structure that CLIP does not have: fine as long as it says so.
_ABSENT = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
}
# diffusers' EMA wrapper and its former Flax classes add these to a component's config.
_DIFFUSERS = frozenset({
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step",
    "use_ema_warmup", "split_head_dim", "use_memory_efficient_attention",
})
# fmt: on


def from_diffusers(cls: type[C], raw: Mapping[str, Any], *, source: str) -> C:
    """The dataclass of a diffusers component's config; InputError for a field not known here."""
    return _from(cls, raw, _DIFFUSERS, source)


def from_transformers(cls: type[C], raw: Mapping[str, Any], *, source: str) -> C:
    """The dataclass of a CLIP tower's config; InputError for a field not known here."""
    known = {k: v for k, v in raw.items() if k not in _ABSENT or v != _ABSENT[k]}
    return _from(cls, known, _TRANSFORMERS, source)


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
