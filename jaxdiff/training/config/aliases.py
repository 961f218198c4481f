"""The table of old spellings of trainings: config fields, their options, and keys of the log.

Each is accepted wherever it was: in a Python config, as an option (which the help does not list),
in the config.json of a workdir, and in its log. Given together with its new spelling it is an
error.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from jaxdiff.core.aliases import rename_keys
from jaxdiff.core.configs import check_needs, typed

C = TypeVar("C", bound=type)

# Section of the config -> old name -> new name.
FIELDS: dict[str, dict[str, str]] = {
    "": {
        "accumulate": "gradient_accumulation_steps",
        "keep": "max_checkpoints",
        "max_skipped": "max_nonfinite_steps",
    },
    "data": {
        "items": "num_scenes",
        "widest": "max_aspect_ratio",
        "cell": "bucket_multiple",
        "max_broken": "max_bad_fraction",
        "held_out": "validation_size",
        "cache": "cache_dir",
    },
    "ema": {"widths": "power_stds"},
    "optimiser": {"groups": "lr_multipliers", "final_fraction": "min_lr_ratio"},
    "objective": {
        "only_decoder": "freeze_encoder",
        "perceptual": "perceptual_model",
        "heads": "has_attribute_heads",  # no field: in the resume identity alone
        "train": "trainable",
        "gamma": "snr_gamma",
        "times": "timestep_sampling",
        "time_shift": "timestep_shift",
        "caption_dropout_each": "caption_dropout_per_encoder",
        "prior": "prior_data",
        "prior_weight": "prior_loss_weight",
        "sample_scale": "sample_guidance_scale",
        "evaluated": "num_eval_images",
        "clip": "eval_clip",
        "scale_width": "guidance_embedding_dim",
        "scales": "guidance_scale_range",
        "draws": "noise_levels_per_image",
    },
    "objective.trainable": {
        "targets": "target_modules",
        "text_targets": "text_target_modules",
        "word": "placeholder_token",
        "begin": "initializer_token",
        "vectors": "num_vectors",
    },
}
# Sections with the fields of another one.
SAME_AS = {"objective.prior_data": "data"}
# Old key of log.jsonl -> new key.
LOG_KEYS = {
    "skipped": "nonfinite_steps",
    "skipped_broken_picture": "skipped_broken_image",
    "skipped_without_picture": "skipped_without_image",
    "to_caption": "image_to_text_loss",
    "to_picture": "text_to_image_loss",
    "attribute_nats": "attribute_loss",
    "adversarial_amount": "adversarial_weight",
    "validation_all_right": "validation_all_correct",
    "validation_one_all_right": "validation_one_object_correct",
    "validation_two_all_right": "validation_two_objects_correct",
    "validation_held_out_one_all_right": "validation_held_out_one_object_correct",
    "validation_held_out_two_all_right": "validation_held_out_two_objects_correct",
    "validation_held_out_all_right": "validation_held_out_correct",
}


def _section(name: str) -> Mapping[str, str]:
    return FIELDS.get(SAME_AS.get(name, name), {})


def new_path(path: str, section: str = "") -> str:
    """The new spelling of a dotted path of fields that begins in `section`.

    What follows a space is kept: keys of a resume identity may have words after the path.
    """
    path, space, words = path.partition(" ")
    names: list[str] = []
    for name in path.split("."):
        names.append(_section(".".join(filter(None, (section, *names)))).get(name, name))
    return ".".join(names) + space + words


def new_option(option: str, section: str = "") -> str:
    """The new spelling of an option such as `data.held-out`, for `core.aliases.rename_options`.

    `section` is that of options without a prefix.
    """
    return new_path(option.replace("-", "_"), section).replace("_", "-")


def new_fields(values: Mapping[str, Any], *, source: str, section: str = "") -> dict[str, Any]:
    """A stored config, or its part `section`, in the new spelling; InputError for both at once."""
    found = rename_keys(values, _section(section), source=source)
    for name, value in found.items():
        if isinstance(value, Mapping):
            below = f"{section}.{name}".lstrip(".")
            found[name] = new_fields(value, source=source, section=below)
    return found


def new_log_keys(values: Mapping[str, float]) -> dict[str, float]:
    """A line of log.jsonl in the new spelling."""
    return {LOG_KEYS.get(name, name): value for name, value in values.items()}


def config_section(section: str) -> Callable[[C], C]:
    """Decorator of the config of a section, whose constructor checks the types of its fields.

    Its `needs`, if it has some, say which fields have no effect without another. It takes the old
    spellings too. `dataclasses.replace` gives every field; an old spelling beside all of them
    replaces its own.
    """

    def decorate(cls: C) -> C:
        fields = {field.name for field in dataclasses.fields(cls)}
        table = {old: new for old, new in _section(section).items() if new in fields}
        construct, hints = cls.__init__, get_type_hints(cls)

        @functools.wraps(construct)
        def init(self: Any, **values: Any) -> None:
            if fields <= values.keys():
                for old in table.keys() & values.keys():
                    del values[table[old]]
            values = rename_keys(values, table)
            for name in values.keys() & fields:
                path = f"{section}.{name}".lstrip(".")
                values[name] = typed(path, values[name], hints[name])
            construct(self, **values)
            check_needs(self, getattr(cls, "needs", {}), prefix=f"{section}." if section else "")

        cls.__init__ = init  # pyright: ignore[reportAttributeAccessIssue]
        return cls

    return decorate
