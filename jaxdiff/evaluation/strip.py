"""One generation step by step, from noise to the image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.core.validate import in_range
from jaxdiff.evaluation.image_grid import labelled_grid

COLUMNS = 8  # by default
ROW_LABELS = (
    "x0: the image that the guided model predicts at this step",
    "x: the noisy latent that it predicts from, over sqrt(alpha^2 + sigma^2), decoded",
)


def make_strip(
    pipe: Any, prompt: str, shown: Sequence[int] | None, *, seed: int = 0, **options: Any
) -> Image.Image:
    """A labelled grid of the predicted images and the noisy latents at the steps `shown`.

    None shows COLUMNS of them. `options` are those of the call of `pipe`.
    """
    (request,) = pipe.resolve(prompt, seed=seed, **options)
    if shown is None:
        shown = evenly_spaced(request.steps, COLUMNS)
    for step in shown:
        in_range("show_steps", step, 0, request.steps - 1)
    out = pipe(prompt, seed=seed, output="latent", intermediate_steps=shown, **options)
    intermediates = out.intermediates
    images = pipe.decode_latents(
        np.concatenate([intermediates.x0[:, 0], intermediates.unit_variance[:, 0]])
    )
    columns = len(intermediates.steps)
    rows = [list(images[:columns]), list(images[columns:])]
    with np.errstate(divide="ignore"):  # of pure noise: inf
        ratios = intermediates.sigma / intermediates.alpha
    column_labels = [
        f"step {step}\nnoise {ratio:.3g}"
        for step, ratio in zip(intermediates.steps, ratios, strict=True)
    ]
    title = (
        f"{prompt} ({request.guidance}, scale {request.guidance_scale:g}, {request.sampler}, "
        f"{request.steps} steps, seed {seed}; noise = sigma / alpha)"
    )
    return labelled_grid(rows, ROW_LABELS, column_labels, title=title)


def evenly_spaced(steps: int, count: int) -> list[int]:
    """Up to `count` evenly spaced steps, from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, steps - 1, count)})
