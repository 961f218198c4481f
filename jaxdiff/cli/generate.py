"""`jaxdiff generate`: prompts in, PNG files out, resumable.

With `--plan TOPOLOGY` nothing is drawn: see `planning`.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import tyro

from jaxdiff.checkpoints import lora_names
from jaxdiff.cli import pictures
from jaxdiff.cli.generate_terminal import Progress, print_report
from jaxdiff.cli.jobs import Job, PromptLine, expand, read_lines
from jaxdiff.core.atomic import os_errors_as_write_error
from jaxdiff.core.configs import prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, positive

TEXTS = ("prompt_2", "negative_prompt", "negative_prompt_2")  # beside the prompt


GUIDANCE = ("guidance", "negative_scale", "classifier_scale", "clip_scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Draw pictures from prompts; what is left out comes from the model's own defaults."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to draw, one or several texts."""
    prompts: pathlib.Path | None = None
    """A file of prompts: .jsonl with {"prompt": ..., "seed": ...} or one prompt a line; resumes."""
    model: str | None = None
    """A diffusers folder, a checkpoint file or a Hub repository; left out: the embedded model."""
    negative_prompt: str | None = None
    """What to keep out of the picture."""
    prompt_2: str | None = None
    """What the second text encoder of SDXL reads; left out: the same text."""
    negative_prompt_2: str | None = None
    """The same for what to keep out."""
    guidance_scale: float | None = None
    """Strength of the guidance: 0 ignores the prompt, 1 is the plain conditional model."""
    guidance: str | None = None
    """The rule of guidance, such as apg:eta=0.2 or cfg+rescale:phi=0.7+interval:lo=0.3,hi=5."""
    negative_scale: float | None = None
    """Weight of the negative prompt in a stream of its own, with --guidance three."""
    classifier_scale: float | None = None
    """How far a classifier of noisy latents steers the picture towards the prompt."""
    classifier: pathlib.Path | None = None
    """Its folder; left out: the model's own classifier/."""
    clip_scale: float | None = None
    """How far CLIP's view of the picture steers it towards the prompt."""
    clip: pathlib.Path | None = None
    """Folder of a CLIP model; left out: the model's own clip/."""
    guide: str | None = None
    """A weaker model of the same kind, for --guidance auto."""
    steps: int | None = None
    """Denoising steps."""
    sampler: str | None = None
    """The rule of one step, such as dpmpp-2m, ddim, euler, ddpm."""
    timesteps: str | None = None
    """Spacing of the steps: leading, trailing, linspace, karras or exponential."""
    eta: float | None = None
    """Share of fresh noise in every step of ddim, from 0 to 1."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""
    image: pathlib.Path | None = None
    """A picture to begin with, of which --strength is redrawn."""
    mask: pathlib.Path | None = None
    """Black where that picture stays, white where something new is drawn."""
    strength: float | None = None
    """How much of the picture is redrawn: 0 nothing, 1 all of it."""
    hires_scale: float | None = None
    """Draw twice: at the size asked for, then enlarged so many times and refined."""
    hires_strength: float = 0.7
    """How much of the enlarged picture is redrawn."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A LoRA file or folder, or PATH:SCALE; again for several."""
    embedding: Annotated[tuple[pathlib.Path, ...], tyro.conf.UseAppendAction] = ()
    """A textual inversion file, whose word prompts can use; again for several."""
    refiner: str | None = None
    """A second model that ends what the first began, such as SDXL's refiner."""
    refiner_start: float = 0.8
    """The share of the way after which the refiner takes over."""
    clip_skip: int | None = None
    """Layers left out at the end of the text encoders."""
    vae_tile: int | None = None
    """Pixels of the tiles in which the VAE makes the picture, to save memory."""
    literal: bool = False
    """Take brackets and BREAK in prompts as what they are, not as weights."""
    seed: int = 0
    """Image j of a prompt has seed + j, whatever stands around it."""
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Pictures of each prompt."""
    batch_size: int = 8
    """Pictures drawn at once, over all devices together."""
    dtype: str | None = None
    """float32, bfloat16 or float16; by default float32 on CPU and bfloat16 elsewhere."""
    output: pathlib.Path = pathlib.Path("out")
    """Folder for the PNG files; pictures that are there with the same settings are kept."""
    json: bool = False
    """Print one JSON object at the end instead of text."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, draw what is missing, report. Raises InputError on bad input."""
    if "--plan" in arguments:
        from jaxdiff.cli.plan import plan_sampling

        plan_sampling(arguments)
        return
    options = tyro.cli(Options, args=arguments, prog="jaxdiff generate")
    started = time.perf_counter()
    jobs = _jobs(options)
    import jaxdiff  # only now: bad arguments and --help need not wait for jax

    pipe = jaxdiff.load(options.model, options.dtype)
    model = {"model": pipe.name, **_load_addons(pipe, options), **_passes(options)}
    plan = _plan(pipe, options, jobs, model)
    todo = [(job, settings) for job, settings in plan if _missing(options, job, settings)]
    with Progress(images=len(todo), quiet=options.json) as progress:
        timings = _draw(_call(pipe, options), options, todo, progress)
    total = time.perf_counter() - started
    images = [str(options.output / f"{job.name}.png") for job, _ in plan]
    report = {
        "images": images,
        "seeds": [job.seed for job, _ in plan],
        "skipped": len(plan) - len(todo),
        **{name: round(seconds, 4) for name, seconds in timings.items()},
        "images_per_s": round(len(todo) / _drawing(timings), 4) if todo else None,
        "total_s": round(total, 4),
        "device": pipe.device_name,
    }
    print_report(report, as_json=options.json)


def _jobs(options: Options) -> list[Job]:
    """The pictures that the options ask for; names that would collide are an error."""
    if bool(options.prompt) == (options.prompts is not None):
        raise InputError("prompt: got none or both, expected a PROMPT or --prompts FILE")
    positive("num_images", options.num_images)
    in_range("seed", options.seed, 0, 2**32 - 1)
    positive("batch_size", options.batch_size)
    lines = [("", PromptLine(prompt=text)) for text in options.prompt]
    if options.prompts is not None:
        lines = read_lines(options.prompts)
    jobs = list(expand(lines, _common(options), numbered=options.prompts is not None))
    for name in ("mask", "strength"):
        value = getattr(options, name)
        if value is not None and all(job.asks.image is None for job in jobs):
            raise InputError(f"{name}: got {value} without an image, expected both")
    by_name: dict[str, Job] = {}
    for job in jobs:
        if by_name.setdefault(job.name, job) != job:
            raise InputError(
                f"prompt: got {by_name[job.name].asks.prompt!r:.60} and {job.asks.prompt!r:.60}, "
                f"which would both be {job.name}.png, expected one of them, or a file for --prompts"
            )
    return list(by_name.values())


def _common(options: Options) -> PromptLine:
    """What holds for all prompts that do not say otherwise."""
    shared = (*TEXTS, "guidance_scale", "strength", "seed", "num_images")
    return PromptLine(
        prompt="",
        image=None if options.image is None else str(options.image),
        mask=None if options.mask is None else str(options.mask),
        **{name: getattr(options, name) for name in shared},
    )


def _plan(
    pipe: Any, options: Options, jobs: Sequence[Job], model: dict[str, Any]
) -> list[tuple[Job, dict[str, Any]]]:
    """Every job with its complete settings, so that a bad one shows before anything is drawn."""
    model = model | {"weights": pipe.fingerprint}
    plan, digest = [], functools.cache(pictures.digest)
    # First without any prompt: what the command line says is the fault of no line.
    (bare,) = expand([("", PromptLine(prompt="", num_images=1))], _common(options), numbered=True)
    pipe.resolve(**_arguments(options, [bare]))
    for job in jobs:
        with prefix_errors(job.source):
            request = pipe.resolve(**_arguments(options, [job]))
            plan.append((job, model | _files(job, digest) | request.to_metadata(0)))
    return plan


def _load_addons(pipe: Any, options: Options) -> dict[str, Any]:
    """Load LoRAs and words; returns what the pictures' settings say of them and of their files."""
    loras = {}
    for lora in options.lora:
        path, scale = _path_and_scale(lora)
        name = pipe.load_lora(path, scale)
        loras[f"{name} {pictures.digest(*lora_names.files(pathlib.Path(path)))}"] = scale
    words = [
        f"{pipe.load_textual_inversion(path)} {pictures.digest(path)}" for path in options.embedding
    ]
    said: dict[str, Any] = {"loras": loras, "embeddings": words} | _load_company(pipe, options)
    return {name: value for name, value in said.items() if value}


def _load_company(pipe: Any, options: Options) -> dict[str, Any]:
    """Load networks that guide or steer; returns what the pictures' settings say of them."""
    said: dict[str, Any] = {}
    for name in ("classifier", "clip"):
        folder = getattr(options, name)
        if folder is not None:
            getattr(pipe, f"load_{name}")(folder)
            said[name] = folder.resolve().name
    if options.guide is not None:
        import jaxdiff

        guide = jaxdiff.load(options.guide, options.dtype)
        pipe.set_guide(guide)
        said["guide"] = f"{guide.name} {guide.fingerprint}"
    return said


def _arguments(options: Options, jobs: Sequence[Job]) -> dict[str, Any]:
    """What the pipeline is called with for these jobs, which are alike."""
    names = ("steps", "sampler", "timesteps", "eta", "clip_skip", "height", "width", *GUIDANCE)
    asked = [job.asks for job in jobs]
    scales = [asks.guidance_scale for asks in asked]
    given = {
        name: [pictures.read(name, pathlib.Path(path)) for path in paths]
        for name in ("image", "mask")
        if None not in (paths := [getattr(asks, name) for asks in asked])
    }
    return given | {
        **{name: getattr(options, name) for name in names},
        "prompt": [asks.prompt for asks in asked],
        **{name: [getattr(asks, name) for asks in asked] for name in TEXTS},
        "guidance_scale": None if None in scales else scales,
        "strength": asked[0].strength,
        "seed": [job.seed for job in jobs],
        "prompt_syntax": False if options.literal else None,
    }


def _files(job: Job, digest: Callable[[pathlib.Path], str]) -> dict[str, Any]:
    """What a picture's settings say of the files that it began with."""
    paths = {name: pathlib.Path(getattr(job.asks, name) or "") for name in ("image", "mask")}
    return {name: f"{path.name} {digest(path)}" for name, path in paths.items() if path.name}


def _path_and_scale(lora: str) -> tuple[str, float]:
    """PATH or PATH:SCALE taken apart."""
    path, colon, scale = lora.rpartition(":")
    try:
        return (path, float(scale)) if colon else (lora, 1.0)
    except ValueError:
        return lora, 1.0


def _passes(options: Options) -> dict[str, Any]:
    """What the pictures' settings say of second passes."""
    said: dict[str, Any] = {}
    if options.hires_scale is not None:
        if options.refiner is not None:
            raise InputError("hires_scale: got it with a refiner, expected one of them")
        said |= {"hires_scale": options.hires_scale, "hires_strength": options.hires_strength}
    if options.refiner is not None:
        said |= {"refiner": options.refiner, "refiner_start": options.refiner_start}
    return said


def _call(pipe: Any, options: Options) -> Callable[..., Any]:
    """What draws: the model, or two passes."""
    from jaxdiff.pipeline import hires_fix

    if options.hires_scale is not None:
        return functools.partial(
            hires_fix.hires_fix, pipe, scale=options.hires_scale, redrawn=options.hires_strength
        )
    if options.refiner is not None:
        import jaxdiff

        refiner = jaxdiff.load(options.refiner, options.dtype)
        return functools.partial(hires_fix.refine, pipe, refiner, start=options.refiner_start)
    return pipe


def _missing(options: Options, job: Job, settings: dict[str, Any]) -> bool:
    """False where the picture is there with the same settings; others are never overwritten."""
    path = options.output / f"{job.name}.png"
    there = pictures.settings_of(path)
    if there is None:
        return True
    for name in settings | there:
        before, now = there.get(name), settings.get(name)
        if before != now:
            raise InputError(
                f"output: got {path}, made with {name} {before!r} instead of {now!r}, "
                "expected another --output folder"
            )
    return False


def _draw(
    draw: Callable[..., Any],
    options: Options,
    todo: Sequence[tuple[Job, dict[str, Any]]],
    progress: Progress,
) -> dict[str, float]:
    """Draw and write batch by batch; what is written stays if the next one is interrupted."""
    size = min(options.batch_size, max(len(todo), 1))
    total = {"compile_s": 0.0, "encode_s": 0.0, "sample_s": 0.0, "decode_s": 0.0}
    with os_errors_as_write_error(options.output, "a folder to write to"):
        options.output.mkdir(parents=True, exist_ok=True)
    for batch in _batches(todo, size):
        arguments = _arguments(options, [job for job, _ in batch])
        arguments["guidance_scale"] = [settings["guidance_scale"] for _, settings in batch]
        progress.begin(len(batch))
        out = draw(**arguments, vae_tile=options.vae_tile, batch_size=size, report=progress.steps)
        for (job, settings), image in zip(batch, out.images, strict=True):
            pictures.write(options.output / f"{job.name}.png", image, settings)
        total = {name: total[name] + out.timings[name] for name in total}
    return total


def _batches(
    todo: Sequence[tuple[Job, dict[str, Any]]], size: int
) -> Iterator[Sequence[tuple[Job, dict[str, Any]]]]:
    """Batches of at most `size` jobs that one call can draw: as large, begun in the same way."""
    alike: dict[Any, list[tuple[Job, dict[str, Any]]]] = {}
    for job, settings in todo:
        begun = ("image" in settings, "mask" in settings, settings.get("strength"))
        key = (settings["height"], settings["width"], *begun)
        alike.setdefault(key, []).append((job, settings))
    for group in alike.values():
        for first in range(0, len(group), size):
            yield group[first : first + size]


def _drawing(timings: dict[str, float]) -> float:
    """Seconds from text to pictures, without compiling."""
    return timings["encode_s"] + timings["sample_s"] + timings["decode_s"]
