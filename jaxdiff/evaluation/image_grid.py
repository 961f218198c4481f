"""A labelled grid of images as one image."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from jaxdiff.core.types import NDArray, UInt8

CELL, GAP, LABEL, LINE = 128, 6, 210, 22  # pixels
LARGE = 256  # cell of images larger than CELL
FONT = 15

Rows = Sequence[Sequence[UInt8[NDArray, "h w 3"] | None]]


def labelled_grid(
    images: Rows,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    footers: Sequence[Sequence[str]] = (),
    *,
    title: str = "",
) -> Image.Image:
    """Rows of images with labels at the left and above; None leaves a cell blank.

    `footers` divides the rows into as many blocks of equal height, each with texts under its
    columns. Images keep their aspect ratio; those of up to CELL pixels are shown at CELL, others at
    LARGE.
    """
    sides = [side for row in images for image in row if image is not None for side in image.shape]
    cell = LARGE if max(sides) > CELL else CELL
    font, per_block = ImageFont.load_default(FONT), len(images) // max(1, len(footers))
    top = LINE * (1 + max(head.count("\n") for head in column_labels)) + (LINE if title else 0)
    block = per_block * (cell + GAP) + (2 * LINE if footers else 0)
    width = LABEL + len(column_labels) * (cell + GAP)
    canvas = Image.new("RGB", (width, top + len(images) // per_block * block), "white")
    pen = ImageDraw.Draw(canvas)

    def write(texts: Sequence[str], y: float) -> None:
        for column, text in enumerate(texts):
            x = LABEL + column * (cell + GAP) + cell / 2
            pen.multiline_text((x, y), text, "black", font, anchor="mm", align="center")

    if title:
        room = int((width - 16) / pen.textlength("n", font))
        pen.text((8, LINE / 2), textwrap.shorten(title, room), "black", font, anchor="lm")
    write(column_labels, (top + (LINE if title else 0)) / 2)
    for row, (cells, label) in enumerate(zip(images, row_labels, strict=True)):
        y = top + row // per_block * block + row % per_block * (cell + GAP)
        pen.multiline_text((8, y + cell / 2), _wrapped(label), "black", font, anchor="lm")
        for column, image in enumerate(cells):
            x = LABEL + column * (cell + GAP)
            if image is None:
                pen.text((x + cell / 2, y + cell / 2), "-", "grey", font, anchor="mm")
            else:
                canvas.paste(_fitted(image, cell), (x, y))
    for number, texts in enumerate(footers):
        write(texts, top + (number + 1) * block - LINE)
    return canvas


def _fitted(image: UInt8[NDArray, "h w 3"], cell: int) -> Image.Image:
    """The image with its longer side as long as a cell."""
    height, width = image.shape[:2]
    longest = max(height, width)
    size = max(1, width * cell // longest), max(1, height * cell // longest)
    return Image.fromarray(image).resize(size, Image.Resampling.BOX)


def _wrapped(label: str) -> str:
    """Lines that fit beside the images."""
    lines = [part for line in label.split("\n") for part in textwrap.wrap(line, 24)]
    return "\n".join(lines)
