"""Every key of the configs of diffusers' and transformers' classes, and what it does here.

A key counts, or has values that are refused, or has no effect, and then the table says why. Keys
of networks count if their config classes have them; those name their exceptions, UNSUPPORTED and
NO_EFFECT.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


class Effect(NamedTuple):
    """What a key does."""

    kind: str  # "counts", "refused" or "no effect"
    text: str  # what for, or why
    accepted: tuple[Any, ...] = ()  # the values of a key that is otherwise refused


def counts(text: str) -> Effect:
    """A key that is read."""
    return Effect("counts", text)


def refused(text: str, *accepted: Any) -> Effect:
    """A key of which only some values are implemented."""
    return Effect("refused", text, accepted)


def no_effect(why: str) -> Effect:
    """A key that changes no picture."""
    return Effect("no effect", why)


_SAMPLER = "chooses the sampler; if none has the value, one must be chosen by name"
_DYNAMIC = "of a shift of flows by resolution"
SCHEDULER_KEYS: dict[str, Effect] = {
    "num_train_timesteps": counts("timesteps of training"),
    "beta_start": counts("of the noise schedule"),
    "beta_end": counts("of the noise schedule"),
    "beta_schedule": counts("of the noise schedule"),
    "trained_betas": counts("of the noise schedule"),
    "rescale_betas_zero_snr": counts("zero terminal SNR, whatever the class"),
    "prediction_type": counts("what the network predicts"),
    "timestep_spacing": counts("with the samplers whose class knows it"),
    "steps_offset": counts("with leading spacing; 1 in Stable Diffusion 1 and 2"),
    "set_alpha_to_one": counts("where ddim and pndm end"),
    "skip_prk_steps": counts("chooses pndm or pndm:skip_prk_steps=false"),
    "original_inference_steps": counts("timesteps of lcm and tcd"),
    "use_karras_sigmas": counts("the sigma schedule"),
    "use_exponential_sigmas": counts("the sigma schedule"),
    "use_beta_sigmas": counts("the sigma schedule"),
    "final_sigmas_type": counts(f"where the last step ends; in solvers, {_SAMPLER}"),
    "lambda_min_clipped": counts("with DPM-Solver"),
    "algorithm_type": counts(_SAMPLER),
    "solver_order": counts(_SAMPLER),
    "lower_order_final": counts(
        f"with unipc and deis, {_SAMPLER}; else steps to a clean image are of first order anyway"
    ),
    "solver_type": counts(_SAMPLER),
    "euler_at_final": counts(_SAMPLER),
    "predict_x0": counts(_SAMPLER),
    "disable_corrector": counts(_SAMPLER),
    "solver_p": counts(_SAMPLER),
    "timestep_scaling": counts(_SAMPLER),
    "variance_type": counts(f"with ddpm, {_SAMPLER}; others read no learned variance"),
    "shift": counts("of flows"),
    "use_dynamic_shifting": counts(_DYNAMIC),
    "time_shift_type": counts(_DYNAMIC),
    "base_shift": counts(_DYNAMIC),
    "max_shift": counts(_DYNAMIC),
    "base_image_seq_len": counts(_DYNAMIC),
    "max_image_seq_len": counts(_DYNAMIC),
    "shift_terminal": counts("of flows"),
    "thresholding": counts("as guidance wrapper threshold, whatever the rule"),
    "use_lu_lambdas": refused("a sigma schedule", False, None),
    "use_flow_sigmas": refused("flows in solvers of other schedules", False, None),
    "invert_sigmas": refused("a flow from images to noise", False, None),
    "stochastic_sampling": refused("noise between the steps of flows", False, None),
    "interpolation_type": refused("levels between two timesteps", "linear", None),
    "timestep_type": refused("timesteps of continuous networks", "discrete", None),
    "sigma_min": refused("the range of sigma schedules; counts in EDM's classes", None),
    "sigma_max": refused("the range of sigma schedules; counts in EDM's classes", None),
    "rho": refused("of EDM's karras sigmas", 7.0),
    "sigma_schedule": counts("the sigma schedule of EDM's classes"),
    "sigma_data": counts("of EDM's classes: latents are divided by it"),
    "clip_sample": counts("of pixels, as guidance wrapper clip-sample; latents are never clipped"),
    "clip_sample_range": counts("with clip_sample"),
    "dynamic_thresholding_ratio": counts("with thresholding"),
    "sample_max_value": counts("with thresholding"),
    "flow_shift": no_effect("only read with use_flow_sigmas"),
}

EDM_KEYS = ("sigma_min", "sigma_max")  # that count in EDM's classes

# What else those files hold.
DIFFUSERS_NO_EFFECT = {
    "of averaged weights (EMA)": (
        "decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup"
    ),
    "of former Flax classes, how attention is computed": (
        "split_head_dim use_memory_efficient_attention"
    ),
    "in AutoencoderTiny, decoder_block_out_channels once more": "block_out_channels",
}
TRANSFORMERS_NO_EFFECT = {
    "of training": (
        "activation_dropout attention_dropout attention_probs_dropout_prob classifier_dropout "
        "dropout dropout_rate encoder_layerdrop finetuning_task gradient_checkpointing "
        "hidden_dropout_prob init_std initializer_factor initializer_range logit_scale_init_value "
        "problem_type tf_legacy_loss"
    ),
    "of text generation": (
        "bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample "
        "early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty "
        "forced_bos_token_id forced_eos_token_id length_penalty max_length min_length "
        "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences prefix "
        "remove_invalid_values repetition_penalty sep_token_id suppress_tokens "
        "task_specific_params temperature top_k top_p typical_p use_cache"
    ),
    "of classification": "id2label label2id",
    "of a decoder, and numbers of positions that count nowhere": (
        "n_positions num_decoder_layers output_past scale_decoder_outputs"
    ),
    "what is returned, and how it is computed": (
        "attn_implementation chunk_size_feed_forward output_attentions output_hidden_states "
        "output_scores return_dict return_dict_in_generate torchscript"
    ),
    "the dtype is chosen where a model is loaded": "dtype torch_dtype use_bfloat16",
    "in LDMBertModel, encoder_layers once more": "num_hidden_layers",
    "of the file itself": "architectures model_type tokenizer_class transformers_version",
    "of another part of CLIP, where a config class does not have it": (
        "projection_dim bos_token_id eos_token_id pad_token_id"
    ),
    "there is nothing to tie or prune": "pruned_heads tie_word_embeddings",
}


def names(table: dict[str, str]) -> frozenset[str]:
    """The keys of a table of reasons."""
    return frozenset(name for listed in table.values() for name in listed.split())


def component_keys(cls: type) -> dict[str, Effect]:
    """The keys of a network's config.json that its config class has."""
    effects: dict[str, Effect] = {}
    limits: Mapping[str, tuple[Any, ...]] = getattr(cls, "UNSUPPORTED", {})
    reasons: Mapping[str, str] = getattr(cls, "NO_EFFECT", {})
    for field in dataclasses.fields(cls):
        if why := reasons.get(field.name):
            effects[field.name] = no_effect(why)
        elif accepted := limits.get(field.name):
            effects[field.name] = refused("the network", *accepted)
        else:
            effects[field.name] = counts("the network")
    return effects
