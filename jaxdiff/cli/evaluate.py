"""`jaxdiff evaluate`: how well a scene model follows its prompts."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from jaxdiff.checkpoints import model_options
from jaxdiff.checkpoints.model_options import ModelOptions
from jaxdiff.cli.arguments import parse
from jaxdiff.core.atomic import atomic_file, check_file
from jaxdiff.core.configs import Need, check_needs
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import positive
from jaxdiff.evaluation.alignment import Judge, Prompt, evaluate_alignment, model_generator
from jaxdiff.experiments.procedural import EMBEDDED_DATA, procedural_dataset

NUM_SEEDS = 100  # images of --prompt if --num-images is left out
# Options of the model's call.
CALL = (
    *("guidance_scale", "guidance", "classifier_scale"),
    *("steps", "sampler", "timestep_spacing"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Generate images of standard scene prompts that were not trained on, and score them.

    With --prompt: images of that prompt from consecutive seeds.
    """

    model: str | None = None
    """A diffusers folder, a checkpoint file, a Hub repository, or "renders" for exact renderings.
    Default: the embedded model."""
    then: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A model that enlarges the images, or makes them of the embeddings of a prior, or
    MODEL:NAME=VALUE,NAME=VALUE with options of its own. Repeat the option for several."""
    guidance_scale: float | None = None
    """Guidance scale. Default: the model's own."""
    guidance: str | None = None
    """Guidance rule, such as apg or cfg+rescale:phi=0.7."""
    classifier_scale: float | None = None
    """Scale of classifier guidance."""
    steps: int | None = None
    """Number of denoising steps."""
    sampler: str | None = None
    """Sampler; `jaxdiff generate --help` lists them, and the guidance rules."""
    timestep_spacing: str | None = None
    """Spacing of the timesteps."""
    seed: int = 0
    """Seed of the first image."""
    batch_size: int = 64
    """Images per batch."""
    mesh: str | None = None
    """Share weights and work between devices, such as fsdp=4,tensor=2 or guidance=2."""
    prompt_stride: int = 1
    """Use only every n-th prompt: faster, with larger errors."""
    prompt: str | None = None
    """Use this caption of a scene instead of the standard prompts."""
    num_images: int | None = None
    """Number of images of --prompt, with consecutive seeds. Default: 100."""
    output: pathlib.Path | None = None
    """Also write the report to this JSON file."""


NEEDS = {
    **model_options.NEEDS,
    "num_images": Need("prompt"),
    "prompt_stride": Need("prompt", (None,)),
}


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, generate, score, print the table. Raises InputError on bad input."""
    options = parse(Options, arguments, prog="jaxdiff evaluate")
    check_needs(options, NEEDS)
    judge = procedural_dataset(EMBEDDED_DATA)
    prompts, probes = _prompts(options, judge)
    if options.output is not None:
        check_file(options.output)  # before any image is generated
    size = options.batch_size
    if options.model == "renders":
        if given := options.components() | ({"then": options.then[0]} if options.then else {}):
            name, value = next(iter(given.items()))
            raise InputError(f"{name}: got {value!s:.80} for model renders, expected it left out")
        generate = judge.render_generator(prompts)
    else:
        import jaxdiff  # only now: bad arguments and --help need not wait for jax
        from jaxdiff.generation.models import StageOptions, check_addons
        from jaxdiff.pipeline.load import models_of
        from jaxdiff.pipeline.request import check_options

        choices = {name: getattr(options, name) for name in CALL}
        check_options(choices)
        check_addons(then=options.then)
        loaded = jaxdiff.load(options.model, mesh=options.mesh, **options.components())
        first, *others = models_of(loaded)
        stages = StageOptions(then=options.then).stages(first, None, others)
        pipe = jaxdiff.Cascade(first, *stages) if stages else first
        last = pipe.pipes[-1] if stages else first
        generate = model_generator(pipe, judge, batch_size=size, last=last, **choices)
    report = evaluate_alignment(
        generate, judge, prompts, seed=options.seed, batch_size=size, probes=probes
    )
    print(report.table())
    if options.output is not None:
        with atomic_file(options.output) as temporary:
            temporary.write_text(json.dumps(report.to_mapping(), indent=2) + "\n")


def _prompts(options: Options, judge: Judge) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """The prompts to score, and those of the judge's own measures."""
    stride = positive("prompt_stride", options.prompt_stride)
    if options.prompt is None:
        return judge.standard_prompts()[::stride], judge.probe_prompts(stride)
    prompt = judge.parse_prompt(options.prompt)
    count = NUM_SEEDS if options.num_images is None else positive("num_images", options.num_images)
    return [prompt] * count, []
