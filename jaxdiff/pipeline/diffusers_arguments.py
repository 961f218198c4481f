"""Arguments of diffusers' pipelines: those with another name here, and what replaces the others."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from jaxdiff.core.aliases import ARGUMENTS, rename_keys
from jaxdiff.core.errors import InputError
from jaxdiff.families.registry import request_options
from jaxdiff.pipeline.request import Defaults, Options, Request

P = ParamSpec("P")
T = TypeVar("T")

RENAMED: Mapping[str, str] = {
    "num_inference_steps": "steps",
    "mask_image": "mask",
    "output_type": "output",
    "original_size_as_tuple": "original_size",
    "crops_coords_top_left": "crop_top_left",
    "negative_crops_coords_top_left": "negative_crop_top_left",
}
OUTPUT_TYPES: Mapping[str, str] = {"np": "numpy"}
_TEXT = "a prompt as text"
_CALLBACK = "callback, which is called as callback(done, steps)"
# What to write instead; None is accepted, as it means the default there too.
REPLACED: Mapping[str, str] = {
    "generator": "seed=7, or a list with one seed per image",
    "num_images_per_prompt": "one seed per image, such as seed=[0, 1, 2, 3]",
    "guidance_rescale": 'guidance="cfg+rescale:phi=0.7"',
    "cross_attention_kwargs": "pipe.load_lora(file, scale)",
    "prompt_embeds": _TEXT,
    "negative_prompt_embeds": _TEXT,
    "pooled_prompt_embeds": _TEXT,
    "negative_pooled_prompt_embeds": _TEXT,
    "callback_on_step_end": _CALLBACK,
    "callback_on_step_end_tensor_inputs": _CALLBACK,
    "callback_steps": _CALLBACK,
    "sigmas": 'timestep_spacing, such as "karras"',
    "return_dict": "it left out: the output has the fields images and timings",
    "padding_mask_crop": "an image that is cropped already",
    "ip_adapter_image": "it left out: there are no image prompts",
    "ip_adapter_image_embeds": "it left out: there are no image prompts",
}


def accept_diffusers_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, a method of the pipeline, which also takes diffusers' names of its arguments.

    Its signature lists all `Options` and those that only some families read, with their defaults;
    None stands for the model's. InputError for arguments that it does not have, with what to use
    instead.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    extras = request_options()
    annotations = Options.__annotations__ | {name: o.annotation for name, o in extras.items()}
    defaults = {f.name: f.default for f in dataclasses.fields(Request)} | {
        name: option.default for name, option in extras.items()
    }
    # In a request these have none: a model has its own.
    defaults |= dict.fromkeys((f.name for f in dataclasses.fields(Defaults)), None) | {"seed": 0}
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults[name],
            annotation=annotation,
        )
        for name, annotation in annotations.items()
    ]
    known = {*(p.name for p in own), *annotations, *ARGUMENTS} - {"self"}

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **_translated(kwargs, known | request_options().keys()))  # pyright: ignore[reportCallIssue]

    # What help and notebooks show: every option by its name.
    called.__signature__ = signature.replace(parameters=[*own, *options])  # pyright: ignore
    return called


def _translated(arguments: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    renamed = rename_keys(arguments, RENAMED)
    for name in REPLACED.keys() & renamed.keys():
        if (got := renamed.pop(name)) is not None:
            raise InputError(f"{name}: got {got!r:.60}, expected {REPLACED[name]}")
    for name in renamed.keys() - known:
        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"{name}: got an unknown argument, expected one of help(pipe){hint}")
    if isinstance(renamed.get("output"), str):
        renamed["output"] = OUTPUT_TYPES.get(renamed["output"], renamed["output"])
    return renamed
