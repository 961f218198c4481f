"""The `parameters` text that A1111's web UI writes into PNG files, and reads from them.

One line for the prompt, one for the negative prompt, and one of fields `Name: value`. What the web
UI has no word for is in fields of its own, which it keeps and does not read; so are hashes, which
are others than its own.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxdiff.core.aliases import WEB_UI_SAMPLERS
from jaxdiff.core.notation import split_options

SAMPLER_WORDS: Mapping[str, str] = {name: word for word, name in WEB_UI_SAMPLERS.items()}
SCHEDULE_WORDS: Mapping[str | None, str] = {
    None: "Automatic",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "linspace": "Uniform",
    "trailing": "SGM Uniform",
    "leading": "DDIM",
}
OPTION_WORDS: Mapping[str, str] = {
    "s_churn": "Sigma churn",
    "s_tmin": "Sigma tmin",
    "s_tmax": "Sigma tmax",
    "s_noise": "Sigma noise",
}
# Settings that fields or lines of the text have in other words.
_IN_OTHER_WORDS = {
    *("prompt", "negative_prompt", "steps", "sampler", "timestep_spacing", "guidance_scale"),
    *("seed", "width", "height", "model", "vae", "strength", "clip_skip", "eta"),
    *("hires_scale", "hires_strength", "refiner", "refiner_start"),
}


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The settings of an image as such a text."""
    loras = {name.split(" ")[0]: scale for name, scale in settings.get("loras", {}).items()}
    prompt = [settings["prompt"], *(f"<lora:{name}:{scale:g}>" for name, scale in loras.items())]
    lines = [" ".join(prompt)]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in _fields(settings)))
    return "\n".join(lines)


def _fields(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values of the fields, in the order of the web UI; the others last."""
    sampler, options = split_options("sampler", settings["sampler"])
    spacing = settings.get("timestep_spacing")
    eta = options.pop("eta", settings.get("eta"))
    fields = {
        "Steps": settings["steps"],
        "Sampler": SAMPLER_WORDS.get(sampler, sampler),
        "Schedule type": SCHEDULE_WORDS.get(spacing, spacing),
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["model"],
        "VAE": settings["vae"].rpartition(" ")[0] if settings.get("vae") else None,
        "Denoising strength": settings.get("hires_strength", settings.get("strength")),
        "Clip skip": settings["clip_skip"] + 1 if settings.get("clip_skip") else None,
        "Eta DDIM": eta,
        **{OPTION_WORDS.get(name, f"Sampler {name}"): value for name, value in options.items()},
        "Hires upscale": settings.get("hires_scale"),
        "Hires upscaler": "Latent" if settings.get("hires_scale") else None,
        "Refiner": settings.get("refiner"),
        "Refiner switch at": settings.get("refiner_start"),
    }
    others = {
        name.replace("_", " ").capitalize(): value
        for name, value in settings.items()
        if name not in _IN_OTHER_WORDS
    }
    return [(name, value) for name, value in (fields | others).items() if value is not None]


def _quoted(value: Any) -> str:
    """A value as the web UI writes it: in quotes if it has characters that separate fields."""
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    separates = any(character in text for character in ",:\n")
    return json.dumps(text, ensure_ascii=False) if separates else text
