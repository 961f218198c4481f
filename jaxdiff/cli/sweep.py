"""`jaxdiff sweep`: a table of pictures, prompts against guidance scales."""

import dataclasses
import pathlib
import textwrap
from collections.abc import Sequence

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from jaxdiff.checkpoints.atomic import check_file, new_file
from jaxdiff.cli.evaluate import measure
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import NDArray, UInt8
from jaxdiff.core.validate import positive
from jaxdiff.evaluation.report import standard_prompts

PROMPTS = (
    "a small red circle above a large blue square",
    "a large yellow star on a pink background",
    "a small cyan ring left of a large black cross",
    "a large green triangle on a grey background",
)
CELL, GAP, LABEL, LINE = 128, 6, 210, 22  # pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Draw every prompt at every guidance scale, from one seed, into one picture."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = PROMPTS
    """The rows."""
    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
    """The columns."""
    model: str | None = None
    """A diffusers folder; the embedded model when left out."""
    measured: bool = False
    """Print under each scale how many of the standard scene prompts come out all right."""
    every: int = 1
    """Measure only each n-th prompt: faster and less certain."""
    steps: int | None = None
    """Denoising steps."""
    sampler: str | None = None
    """The rule of one step."""
    seed: int = 0
    """Of every picture."""
    output: pathlib.Path = pathlib.Path("sweep.png")
    """The PNG file to write."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, draw, write. Raises InputError on bad input."""
    options = tyro.cli(Options, args=arguments, prog="jaxdiff sweep")
    prompts = standard_prompts()[:: positive("every", options.every)]
    if not options.scales:
        raise InputError("scales: got none, expected at least one guidance scale")
    check_file(options.output)  # before pictures are drawn for it
    import jaxdiff  # only now: bad arguments and --help need not wait for jax

    pipe = jaxdiff.load(options.model)
    count = len(options.scales)
    shared = {"steps": options.steps, "sampler": options.sampler}
    rows = [
        pipe(
            [prompt] * count,
            guidance_scale=options.scales,
            seed=[options.seed] * count,
            output="numpy",
            **shared,
        ).images
        for prompt in options.prompt
    ]
    heads = [f"scale {scale:g}" for scale in options.scales]
    feet = []
    for scale in options.scales if options.measured else ():
        shares = measure(pipe, prompts, guidance_scale=scale, **shared).shares
        kinds = {"one thing": "one all right", "two things": "two all right"}
        feet.append(
            "\n".join(
                f"{k} {shares[name].value:.0%}" for k, name in kinds.items() if name in shares
            )
        )
    with new_file(options.output) as temporary:
        table(np.stack(rows), options.prompt, heads, feet).save(temporary, format="PNG")
    print(options.output)


def table(
    images: UInt8[NDArray, "r c h w 3"],
    labels: Sequence[str],
    heads: Sequence[str],
    feet: Sequence[str],
) -> Image.Image:
    """Pictures in rows and columns with texts at the left, above and below."""
    rows, columns = images.shape[:2]
    bottom = LINE + rows * (CELL + GAP)
    size = (LABEL + columns * (CELL + GAP), bottom + 2 * LINE)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for row in range(rows):
        top = LINE + row * (CELL + GAP)
        text = "\n".join(textwrap.wrap(labels[row], 24))
        pen.multiline_text((8, top + CELL / 2), text, "black", font, anchor="lm")
        for column in range(columns):
            cell = Image.fromarray(images[row, column]).resize((CELL, CELL), Image.Resampling.BOX)
            canvas.paste(cell, (LABEL + column * (CELL + GAP), top))
    for texts, y in ((heads, LINE / 2), (feet, bottom + LINE)):
        for column, text in enumerate(texts):
            x = LABEL + column * (CELL + GAP) + CELL / 2
            pen.multiline_text((x, y), text, "black", font, anchor="mm", align="center")
    return canvas
