"""`jaxdiff generate`: prompts in, PNG files out, resumable.

With `--plan TOPOLOGY` what generates images is compiled for absent devices: see `planning`.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

import tyro

from jaxdiff.checkpoints import model_options
from jaxdiff.checkpoints.embedded import EMBEDDED
from jaxdiff.checkpoints.lora_names import files as lora_files
from jaxdiff.checkpoints.lora_names import path_and_scale
from jaxdiff.checkpoints.model_options import COMPONENTS, ModelOptions
from jaxdiff.checkpoints.text_encoder_files import text_encoder_files
from jaxdiff.checkpoints.vae_layouts import vae_files
from jaxdiff.cli import batch_job
from jaxdiff.cli.arguments import asks_help, has_option, parse
from jaxdiff.cli.help import model_defaults, print_choices
from jaxdiff.cli.progress import Progress, note_compile_time, print_report, usual_compile_time
from jaxdiff.core import notation
from jaxdiff.core.configs import Need, check_needs
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, positive
from jaxdiff.generation.from_image import FILES, check_restored, typed_options, with_settings
from jaxdiff.generation.manifest import Entry, Manifest
from jaxdiff.generation.prompt_file import (
    IMAGES,
    ImageJob,
    PromptSpec,
    make_jobs,
    read_prompt_file,
)
from jaxdiff.generation.shards import Shard

# Options of the model's call that all images share.
SHARED = (
    *("guidance", "negative_scale", "classifier_scale", "clip_scale", "sampler"),
    *("timestep_spacing", "eta", "clip_skip", "height", "width", "prompt_syntax"),
    "max_sequence_length",
)
# Which networks of some families read.
FAMILY_OPTIONS = ("distilled_guidance_scale", "noise_level")
LISTED = 100  # images that a JSON report names; the manifest names all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Generate images from prompts. Options that you leave out take the model's defaults."""

    prompt: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="[PROMPT ...]")]
    ] = ()
    """One or more prompts."""
    prompts: str | None = None
    """A prompt file: .jsonl with {"prompt": ..., "seed": ...}, .csv, .parquet, requests of OpenAI's
    Batch API, or text with one prompt per line; a path or a URL. The same command resumes."""
    shard: str | None = None
    """INDEX/COUNT, from 0: generate this part of the prompt file, such as 3/16. Default: what
    Slurm, Kubernetes or a TPU slice say, or else all of it."""
    columns: tuple[str, ...] = ()
    """FIELD=COLUMN for the columns of a table that are to be read, such as prompt=caption."""
    max_bad_lines: int | None = None
    """How many lines of a long prompt file may be no prompts. Default: 100."""
    from_image: Annotated[pathlib.Path | None, tyro.conf.arg(name="from")] = None
    """A PNG file that this command wrote: its settings, except those that other options say."""
    negative_prompt: str | None = None
    """What the image should not show."""
    prompt_2: str | None = None
    """Prompt of the second text encoder, if there is one. Default: the same prompt."""
    negative_prompt_2: str | None = None
    """Negative prompt of the second text encoder. Default: the same negative prompt."""
    prompt_3: str | None = None
    """Prompt of the third text encoder, if there is one. Default: the same prompt."""
    negative_prompt_3: str | None = None
    """Negative prompt of the third text encoder. Default: the same negative prompt."""
    guidance_scale: float | None = None
    """Guidance scale: 0 ignores the prompt, 1 is the plain conditional model."""
    distilled_guidance_scale: float | None = None
    """The scale that the network of FLUX.1 dev takes while a guidance rule such as cfg has the
    guidance scale. Default: 3.5, 30 in Fill, 10 in Canny and Depth."""
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
    """Sampler, such as dpmpp-2m, euler, ddim:eta=0.5 or heun:s_churn=10,s_tmin=0.05."""
    timestep_spacing: str | None = None
    """Spacing of the timesteps: leading, trailing, linspace, karras, exponential or beta; or the
    timesteps themselves, one for each step, such as 999,749,499,249."""
    eta: float | None = None
    """Eta of ddim and tcd: 0 adds no noise in a step, 1 as much as ddpm (ddim) or lcm (tcd)."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""
    image: pathlib.Path | None = None
    """Initial image for image-to-image or inpainting; see --strength. Of models that enlarge or
    vary an image: that image."""
    original_image: pathlib.Path | None = None
    """Initial image of a model that enlarges or varies another one, which is --image."""
    mask: pathlib.Path | None = None
    """Inpainting mask: white is repainted, black is kept."""
    strength: float | None = None
    """How much of the initial image changes: 0 nothing, 1 everything."""
    hires_scale: float | None = None
    """Hires fix: generate at the given size, upscale by this factor, refine."""
    hires_strength: float | None = None
    """Strength of the second pass of the hires fix. Default: 0.7."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A LoRA file or folder, or PATH:SCALE. Repeat the option for several."""
    textual_inversion: Annotated[tuple[pathlib.Path, ...], tyro.conf.UseAppendAction] = ()
    """A textual inversion file, whose token prompts can use. Repeat the option for several."""
    refiner: str | None = None
    """A second model for the last steps, such as SDXL's refiner."""
    refiner_start: float | None = None
    """Fraction of the denoising process after which the refiner takes over. Default: 0.8."""
    then: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A model that enlarges the images, or makes them of the embeddings of a prior, or
    MODEL:NAME=VALUE,NAME=VALUE with options of its own, such as steps=30,noise_level=100 or
    image=PHOTO.png,mask=HOLE.png. Repeat the option for several. :NAME=VALUE,... has the options of
    the next model in the folder of --model, if that has several."""
    noise_level: int | None = None
    """Step of the noise that is added to an image that the model enlarges, or to the embedding of
    one that it varies. Default: the model's."""
    clip_skip: int | None = None
    """Number of layers to skip at the end of the text encoders."""
    max_sequence_length: int | None = None
    """Tokens of a text that T5 reads, at most 512. Default: 256 in Stable Diffusion 3 and FLUX.1
    schnell, 512 in other models."""
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
    mesh: str | None = None
    """Share weights and work between devices, such as fsdp=4,tensor=2 or guidance=2."""
    offload: str | None = None
    """What leaves the devices while it is not needed: text, the text encoders."""
    output: str = "out"
    """Folder for the images, or, with --prompts, its URL. Images that exist with the same settings
    are kept; nothing is overwritten."""
    container: str | None = None
    """folder, tar (webdataset) or openai (an output file of the Batch API). Default: folder, and
    openai for requests of that API."""
    image_format: str | None = None
    """png, webp, jpeg or latents, of the images of --prompts. Default: png."""
    quality: int | None = None
    """Quality of webp and jpeg, 0 to 100. Default: 90 and 95."""
    json: bool = False
    """Print one JSON object at the end instead of text."""


# What options need to have an effect; `make_jobs` says it of those that lines of a file set too.
NEEDS = {
    **model_options.NEEDS,
    "classifier": Need("classifier_scale"),
    "clip": Need("clip_scale"),
    "hires_strength": Need("hires_scale"),
    "refiner_start": Need("refiner"),
    **{name: Need("prompts") for name in batch_job.OPTIONS},
}


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, generate the missing images, report. Raises InputError on bad input."""
    if has_option(arguments, "--plan"):
        from jaxdiff.cli.plan import plan_sampling

        plan_sampling(arguments)
        return
    started = time.perf_counter()
    options, stored, typed = _parsed(arguments)
    if bool(options.prompt) == (options.prompts is not None):
        got = "both a PROMPT and --prompts" if options.prompt else "none"
        raise InputError(f"prompt: got {got}, expected either a PROMPT or --prompts FILE")
    shard = batch_job.chosen_shard(options) if options.prompts else None
    if batch_job.is_batch_job(options, shard):
        _run_batch_job(options, shard)
        return
    jobs = _jobs(options, stored)
    asked = {name: value for name, value in vars(options).items() if name != "json"}
    manifest = Manifest.of(pathlib.Path(options.output), asked, _files(options, jobs))
    entries = manifest.read(jobs)
    if entries is not None:
        report = _report(options, manifest, entries, total=time.perf_counter() - started)
        print_report(report | {"skipped": len(entries)}, as_json=options.json)
        return
    runner, plan, timings = _generate(options, jobs, stored, typed)
    made = [image for image in plan if image.job.name not in runner.failures]
    entries = [Entry.of(image.path, image.job.seed, image.job.source) for image in made]
    manifest.write(entries, runner.failures)
    todo = sum(not image.exists for image in plan)
    generating = timings.pop("generate_s")
    report = _report(options, manifest, entries, total=time.perf_counter() - started) | {
        "failed": len(runner.failures),
        "renamed": sum(image.renamed for image in made if not image.exists),
        "skipped": len(plan) - todo,
        **{name: round(seconds, 4) for name, seconds in timings.items()},
        "images_per_s": round(todo / generating, 4) if todo else None,
        "device": runner.pipe.device_name,
    }
    print_report(report, as_json=options.json)
    if runner.failures:
        raise InputError(
            f"got {len(runner.failures)} of {len(jobs)} images that could not be generated, "
            "expected none; the same command tries them again"
        )


def _run_batch_job(options: Options, shard: Shard | None) -> None:
    """Generate the images of a batch job, and report."""
    _check_numbers(options)
    if options.from_image is not None:
        raise InputError("from: got it with a batch job, expected the options themselves")

    def load() -> tuple[Any, Any, Any]:
        runner, stages = _runner(options, ())
        return runner.pipe, stages, runner.settings

    shared = {name: getattr(options, name) for name in SHARED}
    report = batch_job.run_batch_job(options, _defaults(options), shard, shared, load)
    print_report(report, as_json=options.json)
    if failed := report["failed"] + report["bad_lines"]:
        nouns = "image or line" if failed == 1 else "images or lines"
        raise InputError(
            f"got {failed} {nouns} that could not be generated, expected none; the same command "
            "tries them again"
        )


def _generate(
    options: Options,
    jobs: Sequence[ImageJob],
    stored: Mapping[str, Any] | None,
    typed: Collection[str],
) -> tuple[Any, Sequence[Any], dict[str, float]]:
    """Generate the missing images of `jobs`: the runner, all planned images, seconds by name."""
    with Progress(quiet=options.json) as progress:
        progress.phase(f"loading {options.model or 'the embedded model'}")
        runner, stages = _runner(options, jobs)
        plan = runner.plan(jobs, _defaults(options))
        if stored is not None:
            for image in plan:
                check_restored(stored, image.settings, typed)
        todo = [image for image in plan if not image.exists]
        program = _program(runner, options, todo)
        progress.start(len(todo), compile_s=usual_compile_time(program))
        try:
            timings = runner.generate(
                todo,
                stages,
                batch_size=options.batch_size,
                vae_tile=options.vae_tile,
                on_progress=progress.update,
                on_images=progress.add_images,
            )
        except KeyboardInterrupt:
            done = len(plan) - len(todo) + progress.done
            raise KeyboardInterrupt(
                f"{done} of {len(plan)} images are done; the same command resumes"
            ) from None
    if todo:
        note_compile_time(program, timings["compile_s"])
    return runner, plan, timings


def _parsed(arguments: Sequence[str]) -> tuple[Options, dict[str, Any] | None, set[str]]:
    """The options, with those of the image of --from, its settings, and the options typed."""
    defaults = model_defaults(arguments) if asks_help(arguments) else {}
    try:
        options = parse(Options, arguments, prog="jaxdiff generate", defaults=defaults)
    except SystemExit:
        if asks_help(arguments):
            print_choices()
        raise
    typed, stored = typed_options(arguments), None
    if options.from_image is not None:
        typed |= {"prompt"} if options.prompt else set()
        typed |= {"prompt", *IMAGES} if options.prompts else set()  # those of its lines
        options, stored = with_settings(options, options.from_image, typed)
    check_needs(options, NEEDS)
    return options, stored, typed


def _files(options: Options, jobs: Sequence[ImageJob]) -> set[str | pathlib.Path]:
    """The files and folders that a command reads."""
    loras = [file for lora in options.lora for file in lora_files(path_and_scale(lora)[0])]
    then = [notation.model_and_options("then", text) for text in options.then]
    models = [
        options.base,
        options.guidance_model,
        options.refiner,
        *(model for model, _ in then),
        options.classifier,
        options.clip,
    ]
    given = [options.prompts, options.from_image]
    images = [getattr(spec, name) for spec in (options, *(j.spec for j in jobs)) for name in IMAGES]
    images += [own.get(name) for _, own in then for name in notation.IMAGES]
    paths = {
        options.model or EMBEDDED,
        *loras,
        *options.textual_inversion,
        *models,
        *([] if options.vae is None else vae_files(pathlib.Path(options.vae))),
        *(each for path in options.text_encoders for each in text_encoder_files(path)),
        *given,
        *images,
    }
    return {path for path in paths if path}


def _program(runner: Any, options: Options, images: Sequence[Any]) -> str:
    """What decides for how long a job compiles, in words."""
    settings = images[0].settings if images else {}
    names = ("model", "weights", "sampler", "guidance", "height", "width", *COMPONENTS)
    own = [str(settings.get(name)) for name in names]
    stages = ("image", "mask", "hires_scale", "refiner", "then")
    passes = [name for name in stages if name in settings]
    return " ".join([*own, *passes, str(options.batch_size), runner.pipe.device_name])


def _runner(options: Options, jobs: Sequence[ImageJob]) -> tuple[Any, Any]:
    """The runner with the models that the options name, and the stages after the first.

    What suits no model, in the options or in a job, shows before one is loaded.
    """
    import jaxdiff  # only now: bad arguments and --help need not wait for jax
    from jaxdiff.generation.models import (
        StageOptions,
        check_addons,
        load_addons,
        stored_bytes,
        text_encoders_setting,
        vae_setting,
    )
    from jaxdiff.generation.runner import Runner, check_jobs
    from jaxdiff.parallel.cores import one_device_per_core
    from jaxdiff.pipeline.load import models_of
    from jaxdiff.pipeline.stages import stage_settings

    asked = StageOptions(
        hires_scale=options.hires_scale,
        hires_strength=options.hires_strength,
        refiner=options.refiner,
        refiner_start=options.refiner_start,
        vae=options.vae,
        then=options.then,
    )
    shared = {name: getattr(options, name) for name in SHARED}
    check_jobs(jobs, _defaults(options), shared)
    addons = {
        "loras": options.lora,
        "textual_inversions": options.textual_inversion,
        **{name: getattr(options, name) for name in ("classifier", "clip", "guidance_model")},
        "guidance": options.guidance,
    }
    check_addons(**addons, refiner=options.refiner, then=options.then)
    if options.mesh is None:
        one_device_per_core(stored_bytes(options.model), len(jobs) or sys.maxsize)
    loaded = jaxdiff.load(
        options.model,
        options.dtype,
        mesh=options.mesh,
        offload=options.offload,
        **options.components(),
    )
    pipe, *others = models_of(loaded)
    settings: dict[str, Any] = {"model": pipe.name}
    settings["weights"] = pipe.fingerprint  # before LoRAs change them
    if options.prediction_type is not None:
        settings["prediction_type"] = options.prediction_type
    settings |= {} if options.vae is None else {"vae": vae_setting(options.vae, pipe.codec)}
    settings |= {} if options.base is None else {"base": pathlib.Path(options.base).name}
    if options.text_encoders:
        settings["text_encoders"] = text_encoders_setting(options.text_encoders)
    settings |= load_addons(pipe, **addons, dtype=options.dtype)
    stages = asked.stages(pipe, options.dtype, others)
    runner = Runner(
        pipe=pipe,
        options=shared,
        settings=settings | stage_settings(stages),
        output=pathlib.Path(options.output),
        on_failure=lambda reason: print(f"generate: {reason}", file=sys.stderr),
    )
    return runner, stages


def _report(
    options: Options, manifest: Manifest, entries: Sequence[Entry], *, total: float
) -> dict[str, Any]:
    """What a job of `total` seconds has left, as JSON values."""
    listed = entries[: None if not options.json or len(entries) <= LISTED else 0]
    return {
        "count": len(entries),
        "images": [str(pathlib.Path(options.output, entry.image)) for entry in listed],
        "seeds": [entry.seed for entry in listed],
        "manifest": str(manifest.path),
        **dict.fromkeys(("failed", "renamed", "skipped"), 0),
        **dict.fromkeys(("compile_s", "encode_s", "sample_s", "decode_s"), 0.0),
        "images_per_s": None,
        "device": None,
        "offload": options.offload,
        "total_s": round(total, 4),
    }


def _jobs(options: Options, stored: Mapping[str, Any] | None) -> list[ImageJob]:
    """One job for each image; raises InputError.

    `stored` are the settings of the image of --from; what no option says is of the model's family.
    """
    _check_numbers(options)
    no_extras = {*vars(options), *FILES}
    extras = {name: value for name, value in (stored or {}).items() if name not in no_extras}
    lines = [("", PromptSpec(prompt=text, options=extras)) for text in options.prompt]
    if options.prompts is not None:
        lines = read_prompt_file(options.prompts)
    return make_jobs(lines, _defaults(options), numbered=options.prompts is not None)


def _check_numbers(options: Options) -> None:
    if pathlib.Path(options.output).is_file():
        raise InputError(f"output: got {options.output}, which is a file, expected a folder")
    positive("num_images", options.num_images)
    in_range("seed", options.seed, 0, 2**32 - 1)
    positive("batch_size", options.batch_size)


def _defaults(options: Options) -> PromptSpec:
    """The command line's choices, which a line of a prompt file can override."""
    return PromptSpec(
        prompt="",
        prompt_2=options.prompt_2,
        negative_prompt=options.negative_prompt,
        negative_prompt_2=options.negative_prompt_2,
        prompt_3=options.prompt_3,
        negative_prompt_3=options.negative_prompt_3,
        guidance_scale=options.guidance_scale,
        steps=options.steps,
        image=None if options.image is None else str(options.image),
        original_image=None if options.original_image is None else str(options.original_image),
        mask=None if options.mask is None else str(options.mask),
        strength=options.strength,
        seed=options.seed,
        num_images=options.num_images,
        options={
            name: value for name in FAMILY_OPTIONS if (value := getattr(options, name)) is not None
        },
    )
