"""What other programs call things: A1111's web UI, ComfyUI, k-diffusion, diffusers, scripts.

An error about one of these names says what is nearest to it here. Names of theirs that are simply
accepted are in `aliases`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping

# By names without signs, in lower case; a plus is a p.
OPTIONS: Mapping[str, str] = {
    "scale": "guidance_scale",
    "plms": "sampler",
    "upscale": "hires_scale",
    "fp16": "dtype",
    "half": "dtype",
    "nohalf": "dtype",
    "bf16": "dtype",
    "resolution": "height",
    "s": "seed",
    "cfg": "guidance_scale",
    "cfgscale": "guidance_scale",
    "guidancerescale": "guidance",
    "numinferencesteps": "steps",
    "samplesteps": "steps",
    "samplingsteps": "steps",
    "ddimsteps": "steps",
    "samplername": "sampler",
    "samplingmethod": "sampler",
    "samplemethod": "sampler",
    "scheduler": "sampler",
    "scheduletype": "timestep_spacing",
    "schedule": "timestep_spacing",
    "sigmas": "timestep_spacing",
    "karras": "timestep_spacing",
    "usekarrassigmas": "timestep_spacing",
    "neg": "negative_prompt",
    "negative": "negative_prompt",
    "uncond": "negative_prompt",
    "initimg": "image",
    "initimage": "image",
    "inputimage": "image",
    "maskimage": "mask",
    "denoise": "strength",
    "denoisingstrength": "strength",
    "hrscale": "hires_scale",
    "enablehr": "hires_scale",
    "hiresupscale": "hires_scale",
    "hiresfix": "hires_scale",
    "hrdenoisingstrength": "hires_strength",
    "niter": "num_images",
    "nsamples": "num_images",
    "batchcount": "num_images",
    "numimagesperprompt": "num_images",
    "clipstopatlastlayers": "clip_skip",
    "refinerswitchat": "refiner_start",
    "refinercheckpoint": "refiner",
    "ckpt": "model",
    "checkpoint": "model",
    "modelid": "model",
    "modelpath": "model",
    "pretrainedmodelnameorpath": "model",
    "vaepath": "vae",
    "loraweights": "lora",
    "lorapath": "lora",
    "ti": "textual_inversion",
    "fromfile": "prompts",
    "promptfile": "prompts",
    "promptsfile": "prompts",
    "outdir": "output",
    "outputdir": "output",
    "outputpath": "output",
    "savedir": "output",
    "precision": "dtype",
    "torchdtype": "dtype",
    "w": "width",
    "h": "height",
    "size": "height",
    "vaetiling": "vae_tile",
}
# Of choices: samplers, spacings of timesteps, dtypes, prediction types.
CHOICES: Mapping[str, str] = {
    # samplers
    "plms": "pndm",
    "dpm": "dpmpp-2m",
    "dpmppmultistep": "dpmpp-2m",
    "dpmsolvermultistepscheduler": "dpmpp-2m",
    "dpmsolvermultistep": "dpmpp-2m",
    "dpmpp2msdegpu": "dpmpp-2m-sde",
    "dpmppsde": "dpmpp-2m-sde",
    "dpmpp3msdegpu": "dpmpp-3m-sde",
    "dpmpp2sa": "dpmpp-2s",
    "dpmpp2sancestral": "dpmpp-2s",
    "dpmsolversinglestepscheduler": "dpmpp-2s",
    "eulera": "euler-ancestral",
    "dpm2": "kdpm2",
    "dpm2a": "kdpm2-ancestral",
    "dpm2ancestral": "kdpm2-ancestral",
    "kdpm2discretescheduler": "kdpm2",
    "kdpm2ancestraldiscretescheduler": "kdpm2-ancestral",
    "eulerdiscretescheduler": "euler",
    "eulerancestraldiscretescheduler": "euler-ancestral",
    "heundiscretescheduler": "heun",
    "lmsdiscretescheduler": "lms",
    "pndmscheduler": "pndm",
    "ddimscheduler": "ddim",
    "ddpmscheduler": "ddpm",
    "deismultistepscheduler": "deis",
    "unipcmultistepscheduler": "unipc",
    "lcmscheduler": "lcm",
    "tcdscheduler": "tcd",
    # spacings of timesteps
    "sgmuniform": "trailing",
    "uniform": "linspace",
    "ddimuniform": "leading",
    "normal": "linspace",
    "simple": "linspace",
    # dtypes
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "full": "float32",
    # prediction types
    "eps": "epsilon",
    "v": "v_prediction",
    "vpred": "v_prediction",
    "velocity": "v_prediction",
}
# The end of a sampler's name in A1111's web UI before it had a list of schedules.
SPACINGS: Mapping[str, str] = {
    "karras": "karras",
    "exponential": "exponential",
    "sgmuniform": "trailing",
    "trailing": "trailing",
    "beta": "beta",
}


def did_you_mean(text: str, choices: Iterable[str]) -> str:
    """The end of an error about `text`: " (did you mean ...?)", or nothing.

    A `text` that begins with a hyphen is an option.
    """
    known = {_bare(choice): choice for choice in choices}
    bare, nearest = _bare(text), OPTIONS if text.startswith("-") else {**OPTIONS, **CHOICES}
    suffix = next((each for each in SPACINGS if bare.endswith(each) and bare != each), "")
    for name, end in ((bare, ""), (bare.removesuffix(suffix), suffix)):
        here = known.get(name) or known.get(_bare(nearest.get(name, "")))
        if here is not None:
            spacing = f" with timestep_spacing {SPACINGS[end]!r}" if end else ""
            return f" (did you mean {here!r}{spacing}?)"
    near = difflib.get_close_matches(bare, list(known), n=1, cutoff=0.65)
    return f" (did you mean {known[near[0]]!r}?)" if near else ""


def _bare(name: str) -> str:
    """A name in lower case without signs and without the prefix of k-diffusion's samplers."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p").removeprefix("k_"))
