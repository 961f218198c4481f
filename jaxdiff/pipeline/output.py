"""What a call of the pipeline gives, and the settings that say in which form and how."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxdiff.core.aliases import OUTPUT_FORMS
from jaxdiff.core.configs import typed
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray
from jaxdiff.core.validate import one_of, positive
from jaxdiff.diffusion.grids import TimestepGrid
from jaxdiff.pipeline.compiled_model import ProgressCallback
from jaxdiff.pipeline.intermediates import Intermediates
from jaxdiff.pipeline.notebook import images_html
from jaxdiff.pipeline.request import Request, Requests

OUTPUTS = ("pil", "numpy", "latent")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of a call that are no options of requests; `Pipeline.__call__` has them all."""

    output: str = "pil"  # one of OUTPUTS
    vae_tile: int | None = None
    batch_size: int | None = None  # None: one batch
    callback: ProgressCallback | None = None
    intermediate_steps: Sequence[int] = ()  # becomes a sorted tuple, each once

    def __post_init__(self) -> None:
        form = typed("output", self.output, str)
        self._set("output", one_of("output", OUTPUT_FORMS.get(form, form), OUTPUTS))
        for name in ("vae_tile", "batch_size"):
            self._set(name, typed(name, getattr(self, name), int | None))
        steps = typed("intermediate_steps", self.intermediate_steps, tuple[int, ...])
        self._set("intermediate_steps", tuple(sorted(set(steps))))
        if self.batch_size is not None:
            positive("batch_size", self.batch_size)
        if self.callback is not None and not callable(self.callback):
            raise InputError(
                f"callback: got {self.callback!r:.60}, expected a function of (done, steps)"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def make_settings(given: Mapping[str, Any]) -> Settings:
    """The settings that are `given`, by name; raises InputError."""
    for name in given:
        one_of("argument", name, Settings.__dataclass_fields__)
    return Settings(**given)


class BatchResult(NamedTuple):
    """The images of one batch."""

    numbers: list[int]  # which of the requests these are
    images: NDArray  # uint8 images, or float32 latents
    grid: TimestepGrid
    intermediates: Float[NDArray, "b n 2 *d"]  # x where each step starts, and its D
    failures: dict[int, str]  # by request: why its image is not finite
    timings: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The images in the requested form, their complete requests, and timings."""

    # list of PIL images, uint8 (b, H, W, 3), or scaled float32 latents (b, h, w, c); float32 (b, d)
    # of models that generate embeddings
    images: Any
    requests: Requests  # one for each image
    timings: dict[str, float]  # compile_s, encode_s, sample_s, decode_s, total_s
    intermediates: Intermediates  # the latents at `intermediate_steps`
    # why images are not finite, by their number: those are black, or latents that are not numbers
    failures: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @property
    def watched(self) -> Intermediates:
        """The former name of `intermediates`."""
        return self.intermediates

    @property
    def request(self) -> Requests:
        """The requests, read by columns: `out.request.seeds`, `out.request.steps`."""
        return self.requests

    def __repr__(self) -> str:
        total, request = self.timings["total_s"], self.requests[0]
        size = f"{request.height}x{request.width}"
        return f"Output({len(self.images)} images of {size} in {total:.1f} s)"

    def _repr_html_(self) -> str | None:
        """The images, for notebooks; latents have none."""
        return images_html(self.images, self.requests.prompts)


def check_sizes(requests: Sequence[Request], settings: Settings) -> None:
    """InputError for requests of several sizes where their arrays are to be stacked."""
    sizes = sorted({(request.height, request.width) for request in requests})
    if len(sizes) > 1 and (settings.output != "pil" or settings.intermediate_steps):
        name = "intermediate_steps" if settings.output == "pil" else f"output {settings.output!r}"
        got = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise InputError(f"requests: got sizes {got} with {name}, expected one size")


def collect(
    requests: Sequence[Request], results: Sequence[BatchResult], settings: Settings
) -> Output:
    """The output of all batches of `requests`, in their order."""
    numbers = np.concatenate([result.numbers for result in results])
    order, steps = np.argsort(numbers), tuple(settings.intermediate_steps)
    alpha, sigma = (
        np.concatenate(tables)[order]
        for tables in zip(*((r.grid.alpha, r.grid.sigma) for r in results), strict=True)
    )
    every = [image for result in results for image in result.images]
    images = [every[i] for i in order]
    pairs = np.zeros((len(order), 0, 2, 1, 1, 1), np.float32)  # sizes may differ without steps
    if steps:
        pairs = np.concatenate([result.intermediates for result in results])[order]
    levels = (table[:, list(steps)].T for table in (alpha, sigma))
    alpha, sigma = (table[:, 0] if np.all(table == table[:, :1]) else table for table in levels)
    x, x0 = (np.moveaxis(pairs[:, :, k], 0, 1) for k in (0, 1))
    return Output(
        images=[Image.fromarray(image) for image in images]
        if settings.output == "pil" and images[0].dtype == np.uint8
        else np.stack(images),
        requests=Requests(requests),
        timings={name: sum(r.timings[name] for r in results) for name in results[0].timings},
        intermediates=Intermediates(steps=steps, alpha=alpha, sigma=sigma, x=x, x0=x0),
        failures={number: why for result in results for number, why in result.failures.items()},
    )
