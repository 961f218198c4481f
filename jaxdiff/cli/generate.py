"""`jaxdiff generate`: prompts in, PNG files out, resumable.

With `--plan TOPOLOGY` the sampling loop is compiled for absent devices: see `planning`.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import tyro

from jaxdiff.checkpoints import lora_names
from jaxdiff.cli import png_files
from jaxdiff.cli.progress import Progress, print_report
from jaxdiff.cli.prompt_file import ImageJob, PromptSpec, expand_jobs, read_prompt_file
from jaxdiff.core.atomic import os_errors_as_write_error
from jaxdiff.core.configs import prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, positive

TEXTS = ("prompt_2", "negative_prompt", "negative_prompt_2")  # beside the prompt
SCALES = ("negative_scale", "classifier_scale", "clip_scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Generate images from prompts. Options that you leave out take the model's defaults."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """One or more prompts."""
    prompts: pathlib.Path | None = None
    """A prompt file: .jsonl with {"prompt": ..., "seed": ...}, or text with one prompt per line.
    The same command resumes."""
    model: str | None = None
    """A diffusers folder, a checkpoint file or a Hub repository. Default: the embedded model."""
    negative_prompt: str | None = None
    """What the image should not show."""
    prompt_2: str | None = None
    """Prompt of SDXL's second text encoder. Default: the same prompt."""
    negative_prompt_2: str | None = None
    """Negative prompt of SDXL's second text encoder. Default: the same negative prompt."""
    guidance_scale: float | None = None
    """Guidance scale: 0 ignores the prompt, 1 is the plain conditional model."""
    guidance: str | None = None
    """Guidance rule, such as apg:eta=0.2 or cfg+rescale:phi=0.7+interval:lo=0.3,hi=5."""
    negative_scale: float | None = None
    """Guidance scale of the negative prompt, with --guidance negative."""
    classifier_scale: float | None = None
    """Scale of classifier guidance."""
    classifier: pathlib.Path | None = None
    """Folder of a classifier of noisy latents. Default: the model's own classifier/."""
    clip_scale: float | None = None
    """Scale of CLIP guidance."""
    clip: pathlib.Path | None = None
    """Folder of a CLIP model. Default: the model's own clip/."""
    guidance_model: str | None = None
    """The weaker model of --guidance autoguidance: a folder, a file or a Hub repository."""
    steps: int | None = None
    """Number of denoising steps."""
    sampler: str | None = None
    """Sampler, such as dpmpp-2m, ddim, euler or ddpm."""
    timestep_spacing: str | None = None
    """Spacing of the timesteps: leading, trailing, linspace, karras or exponential."""
    eta: float | None = None
    """Eta of ddim: 0 adds no noise in a step, 1 as much as ddpm."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""
    image: pathlib.Path | None = None
    """Initial image for image-to-image or inpainting; see --strength."""
    mask: pathlib.Path | None = None
    """Inpainting mask: white is repainted, black is kept."""
    strength: float | None = None
    """How much of the initial image changes: 0 nothing, 1 everything."""
    hires_scale: float | None = None
    """Hires fix: generate at the given size, upscale by this factor, refine."""
    hires_strength: float = 0.7
    """Strength of the second pass of the hires fix."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A LoRA file or folder, or PATH:SCALE. Repeat the option for several."""
    textual_inversion: Annotated[tuple[pathlib.Path, ...], tyro.conf.UseAppendAction] = ()
    """A textual inversion file, whose token prompts can use. Repeat the option for several."""
    refiner: str | None = None
    """A second model for the last steps, such as SDXL's refiner."""
    refiner_start: float = 0.8
    """Fraction of the denoising process after which the refiner takes over."""
    clip_skip: int | None = None
    """Number of layers to skip at the end of the text encoders."""
    vae_tile: int | None = None
    """Tile size of the VAE in pixels. Tiles save memory."""
    prompt_syntax: bool = True
    """Read (word:1.3) and [word] in prompts as weights, and BREAK and AND as keywords."""
    seed: int = 0
    """Image j of a prompt has seed + j, at any batch size."""
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Number of images per prompt."""
    batch_size: int = 8
    """Images per batch, over all devices together."""
    dtype: str | None = None
    """float32, bfloat16 or float16. Default: float32 on CPU, bfloat16 elsewhere."""
    output: pathlib.Path = pathlib.Path("out")
    """Folder for the PNG files. Images that exist with the same settings are kept."""
    json: bool = False
    """Print one JSON object at the end instead of text."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, generate the missing images, report. Raises InputError on bad input."""
    if "--plan" in arguments:
        from jaxdiff.cli.plan import plan_sampling

        plan_sampling(arguments)
        return
    options = tyro.cli(Options, args=arguments, prog="jaxdiff generate")
    started = time.perf_counter()
    jobs = _jobs(options)
    import jaxdiff  # only now: bad arguments and --help need not wait for jax

    pipe = jaxdiff.load(options.model, options.dtype)
    model = {"model": pipe.name, **_load_addons(pipe, options), **_second_pass_settings(options)}
    plan = _plan(pipe, options, jobs, model)
    todo = [(job, settings) for job, settings in plan if _is_missing(options, job, settings)]
    with Progress(images=len(todo), quiet=options.json) as progress:
        timings = _generate(_call(pipe, options), options, todo, progress)
    total = time.perf_counter() - started
    images = [str(options.output / f"{job.name}.png") for job, _ in plan]
    report = {
        "images": images,
        "seeds": [job.seed for job, _ in plan],
        "skipped": len(plan) - len(todo),
        **{name: round(seconds, 4) for name, seconds in timings.items()},
        "images_per_s": round(len(todo) / _generation_seconds(timings), 4) if todo else None,
        "total_s": round(total, 4),
        "device": pipe.device_name,
    }
    print_report(report, as_json=options.json)


def _jobs(options: Options) -> list[ImageJob]:
    """One job for each image; InputError where two would have the same file name."""
    if bool(options.prompt) == (options.prompts is not None):
        got = "both a PROMPT and --prompts" if options.prompt else "none"
        raise InputError(f"prompt: got {got}, expected either a PROMPT or --prompts FILE")
    positive("num_images", options.num_images)
    in_range("seed", options.seed, 0, 2**32 - 1)
    positive("batch_size", options.batch_size)
    lines = [("", PromptSpec(prompt=text)) for text in options.prompt]
    if options.prompts is not None:
        lines = read_prompt_file(options.prompts)
    jobs = list(expand_jobs(lines, _defaults(options), numbered=options.prompts is not None))
    for name in ("mask", "strength"):
        value = getattr(options, name)
        if value is not None and all(job.spec.image is None for job in jobs):
            raise InputError(f"{name}: got {value} without an image, expected --image too")
    by_name: dict[str, ImageJob] = {}
    for job in jobs:
        if by_name.setdefault(job.name, job) != job:
            raise InputError(
                f"prompt: got {by_name[job.name].spec.prompt!r:.60} and {job.spec.prompt!r:.60}, "
                f"which would both be written to {job.name}.png, expected one of them or a prompt "
                "file (--prompts)"
            )
    return list(by_name.values())


def _defaults(options: Options) -> PromptSpec:
    """The command line's choices, which a line of a prompt file can override."""
    shared = (*TEXTS, "guidance_scale", "strength", "seed", "num_images")
    return PromptSpec(
        prompt="",
        image=None if options.image is None else str(options.image),
        mask=None if options.mask is None else str(options.mask),
        **{name: getattr(options, name) for name in shared},
    )


def _plan(
    pipe: Any, options: Options, jobs: Sequence[ImageJob], model: dict[str, Any]
) -> list[tuple[ImageJob, dict[str, Any]]]:
    """Each job with its complete settings; raises InputError before any image is generated."""
    model = model | {"weights": pipe.fingerprint}
    plan, digest = [], functools.cache(png_files.file_digest)
    # First without a prompt: a bad option is no mistake of a line.
    empty = PromptSpec(prompt="", num_images=1)
    (bare,) = expand_jobs([("", empty)], _defaults(options), numbered=True)
    pipe.resolve(**_arguments(options, [bare]))
    for job in jobs:
        with prefix_errors(job.source):
            request = pipe.resolve(**_arguments(options, [job]))
            plan.append((job, model | _file_settings(job, digest) | request.to_metadata(0)))
    return plan


def _load_addons(pipe: Any, options: Options) -> dict[str, Any]:
    """Load LoRAs, textual inversions and auxiliary models; returns their entries in the settings.

    An entry has a digest of the file, so that another file of that name is noticed.
    """
    loras = {}
    for lora in options.lora:
        path, scale = _path_and_scale(lora)
        name = pipe.load_lora(path, scale)
        digest = png_files.file_digest(*lora_names.files(pathlib.Path(path)))
        loras[f"{name} {digest}"] = scale
    tokens = [
        f"{pipe.load_textual_inversion(path)} {png_files.file_digest(path)}"
        for path in options.textual_inversion
    ]
    settings: dict[str, Any] = {"loras": loras, "textual_inversions": tokens}
    settings |= _load_auxiliary_models(pipe, options)
    return {name: value for name, value in settings.items() if value}


def _load_auxiliary_models(pipe: Any, options: Options) -> dict[str, Any]:
    """Load classifier, CLIP and guidance model; returns their entries in the settings."""
    settings: dict[str, Any] = {}
    for name in ("classifier", "clip"):
        folder = getattr(options, name)
        if folder is not None:
            getattr(pipe, f"load_{name}")(folder)
            settings[name] = folder.resolve().name
    if options.guidance_model is not None:
        import jaxdiff

        weaker = jaxdiff.load(options.guidance_model, options.dtype)
        pipe.set_guidance_model(weaker)
        settings["guidance_model"] = f"{weaker.name} {weaker.fingerprint}"
    return settings


def _arguments(options: Options, jobs: Sequence[ImageJob]) -> dict[str, Any]:
    """The pipeline's arguments for jobs that can share a call."""
    names = ("guidance", *SCALES, "steps", "sampler", "timestep_spacing", "eta", "clip_skip")
    specs = [job.spec for job in jobs]
    scales = [spec.guidance_scale for spec in specs]
    images = {
        name: [png_files.read_image(name, pathlib.Path(path)) for path in paths]
        for name in ("image", "mask")
        if None not in (paths := [getattr(spec, name) for spec in specs])
    }
    return images | {
        **{name: getattr(options, name) for name in (*names, "height", "width")},
        "prompt": [spec.prompt for spec in specs],
        **{name: [getattr(spec, name) for spec in specs] for name in TEXTS},
        "guidance_scale": None if None in scales else scales,
        "strength": specs[0].strength,
        "seed": [job.seed for job in jobs],
        "prompt_syntax": options.prompt_syntax,
    }


def _file_settings(job: ImageJob, digest: Callable[[pathlib.Path], str]) -> dict[str, Any]:
    """The entries of initial image and mask in the settings: name and digest of each file."""
    paths = {name: pathlib.Path(getattr(job.spec, name) or "") for name in ("image", "mask")}
    return {name: f"{path.name} {digest(path)}" for name, path in paths.items() if path.name}


def _path_and_scale(lora: str) -> tuple[str, float]:
    """The parts of PATH or PATH:SCALE; the scale is 1 by default."""
    path, colon, scale = lora.rpartition(":")
    try:
        return (path, float(scale)) if colon else (lora, 1.0)
    except ValueError:
        return lora, 1.0


def _second_pass_settings(options: Options) -> dict[str, Any]:
    """The entries of hires fix and refiner in the settings."""
    settings: dict[str, Any] = {}
    if options.hires_scale is not None:
        if options.refiner is not None:
            raise InputError(
                "hires_scale: got it together with a refiner, expected only one of them"
            )
        settings |= {"hires_scale": options.hires_scale, "hires_strength": options.hires_strength}
    if options.refiner is not None:
        settings |= {"refiner": options.refiner, "refiner_start": options.refiner_start}
    return settings


def _call(pipe: Any, options: Options) -> Callable[..., Any]:
    """The function that generates images: the model, or two passes."""
    from jaxdiff.pipeline import hires_fix

    if options.hires_scale is not None:
        scale, strength = options.hires_scale, options.hires_strength
        return functools.partial(hires_fix.hires_fix, pipe, scale=scale, hires_strength=strength)
    if options.refiner is not None:
        import jaxdiff

        refiner = jaxdiff.load(options.refiner, options.dtype)
        return functools.partial(hires_fix.refine, pipe, refiner, start=options.refiner_start)
    return pipe


def _is_missing(options: Options, job: ImageJob, settings: dict[str, Any]) -> bool:
    """False if the image exists with the same settings; InputError if it has other settings."""
    path = options.output / f"{job.name}.png"
    stored = png_files.read_settings(path)
    if stored is None:
        return True
    for name in settings | stored:
        before, now = stored.get(name), settings.get(name)
        if before != now:
            raise InputError(
                f"output: got {path}, generated with {name} {before!r} instead of {now!r}, "
                "expected another --output folder"
            )
    return False


def _generate(
    call: Callable[..., Any],
    options: Options,
    todo: Sequence[tuple[ImageJob, dict[str, Any]]],
    progress: Progress,
) -> dict[str, float]:
    """Generate and write batch by batch; written images stay if a later batch is interrupted."""
    size = min(options.batch_size, max(len(todo), 1))
    total = {"compile_s": 0.0, "encode_s": 0.0, "sample_s": 0.0, "decode_s": 0.0}
    with os_errors_as_write_error(options.output, "a folder to write to"):
        options.output.mkdir(parents=True, exist_ok=True)
    for batch in _batches(todo, size):
        arguments = _arguments(options, [job for job, _ in batch])
        arguments["guidance_scale"] = [settings["guidance_scale"] for _, settings in batch]
        progress.start_batch(len(batch))
        out = call(
            **arguments, vae_tile=options.vae_tile, batch_size=size, callback=progress.update
        )
        for (job, settings), image in zip(batch, out.images, strict=True):
            png_files.write_png(options.output / f"{job.name}.png", image, settings)
        total = {name: total[name] + out.timings[name] for name in total}
    return total


def _batches(
    todo: Sequence[tuple[ImageJob, dict[str, Any]]], size: int
) -> Iterator[Sequence[tuple[ImageJob, dict[str, Any]]]]:
    """Batches of at most `size` jobs with the same size, strength and kinds of input."""
    groups: dict[Any, list[tuple[ImageJob, dict[str, Any]]]] = {}
    for job, settings in todo:
        inputs = ("image" in settings, "mask" in settings, settings.get("strength"))
        key = (settings["height"], settings["width"], *inputs)
        groups.setdefault(key, []).append((job, settings))
    for group in groups.values():
        for first in range(0, len(group), size):
            yield group[first : first + size]


def _generation_seconds(timings: dict[str, float]) -> float:
    """Seconds from text to images, without compilation."""
    return timings["encode_s"] + timings["sample_s"] + timings["decode_s"]
