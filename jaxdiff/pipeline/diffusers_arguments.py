"""What the pipeline answers to arguments that it does not have, those of diffusers among them.

Arguments that only have another name there are in `core.aliases`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from jaxdiff.core.errors import InputError
from jaxdiff.core.names_elsewhere import did_you_mean
from jaxdiff.families.options import request_options
from jaxdiff.pipeline.defaults import Defaults
from jaxdiff.pipeline.options import Options
from jaxdiff.pipeline.request import Request

F = TypeVar("F", bound=Callable[..., Any])

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
    "sigmas": 'timestep_spacing, such as "karras" or "999,749,499,249"',
    "return_dict": "it left out: the output has the fields images and timings",
    "padding_mask_crop": "an image that is cropped already",
    "control_image": "image=..., which FLUX.1 Canny and Depth take as the control image",
    "image_reference": "image=..., which FLUX.1 Kontext takes as the reference too",
    "ip_adapter_image": "it left out: there are no IP-Adapters",
    "ip_adapter_image_embeds": "it left out: there are no IP-Adapters",
}


def lists_options(method: F) -> F:
    """`method` of the pipeline; help and notebooks show every option by name, with its default.

    Those of `Options` and those that only some families read; None stands for the model's.
    """
    signature = inspect.signature(method)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    extras = request_options()
    annotations = Options.__annotations__ | {name: o.annotation for name, o in extras.items()}
    defaults = {f.name: f.default for f in dataclasses.fields(Request)} | {
        name: option.default for name, option in extras.items()
    }
    # In a request these have none: a model has its own.
    models = (*(f.name for f in dataclasses.fields(Defaults)), "negative_prompt")
    defaults |= dict.fromkeys(models, None) | {"seed": 0}
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, keyword, default=defaults[name], annotation=annotation)
        for name, annotation in annotations.items()
    ]
    method.__signature__ = signature.replace(parameters=[*own, *options])  # pyright: ignore
    return method


def without_replaced(options: Mapping[str, Any], listed: Collection[str]) -> dict[str, Any]:
    """`options` without those of diffusers that are None, as the default there is.

    InputError for any other that is none here, with what to use instead; `listed` are the arguments
    of a call.
    """
    known = {*Options.__annotations__, *request_options()}
    for name in options.keys() - known:
        if name in listed:
            raise InputError(f"{name}: got no option of requests, expected it in a call only")
        if name in REPLACED and (got := options[name]) is not None:
            raise InputError(f"{name}: got {got!r:.60}, expected {REPLACED[name]}")
        if name not in REPLACED:
            hint = did_you_mean(name, sorted({*listed} - {name, "self"}))
            raise InputError(f"{name}: got an unknown argument, expected one of help(pipe){hint}")
    return {name: value for name, value in options.items() if name in known}
