"""What a notebook shows: a progress bar during a call, and the images of its output."""

import base64
import contextlib
import html
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.core.types import NDArray

PATIENCE_S = 1.0  # a call that takes less shows no bar


@contextlib.contextmanager
def notebook_progress() -> Iterator[Callable[[int, int], None] | None]:
    """The callback that shows a progress bar in a notebook; None elsewhere."""
    if not in_notebook():
        yield None
        return
    bar = NotebookProgress()
    try:
        yield bar
    finally:
        bar.close()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, and not a terminal or a script."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class NotebookProgress:
    """A progress bar over the denoising steps of a batch, for calls that take their time."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._handle: Any = None

    def __call__(self, done: int, steps: int) -> None:
        if self._handle is None and time.perf_counter() - self._started < PATIENCE_S:
            return
        self._show(f'<progress value="{done}" max="{steps}"></progress> {done}/{steps} steps')

    def close(self) -> None:
        """Take the bar away."""
        if self._handle is not None:
            self._show("")

    def _show(self, markup: str) -> None:
        display = sys.modules["IPython"].display
        if self._handle is None:
            self._handle = display.display(display.HTML(markup), display_id=True)
        else:
            self._handle.update(display.HTML(markup))


def images_html(images: Sequence[Image.Image] | NDArray, captions: Sequence[str]) -> str | None:
    """The images side by side, each above its caption, in no other file; None for latents."""
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8:
            return None
        images = [Image.fromarray(image) for image in images]
    figures = []
    for image, caption in zip(images, captions, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        text = html.escape(caption, quote=True)
        figures.append(
            '<figure style="display: inline-block; margin: 4px">'
            f'<img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        )
    return "".join(figures)
