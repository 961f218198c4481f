"""DDIM inversion: from images to the noise from which a call leads back to them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdiff.core.aliases import rename_arguments
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, NDArray
from jaxdiff.data.image_arrays import ImageInput
from jaxdiff.diffusion.grids import TimestepGrid
from jaxdiff.families.base import Family
from jaxdiff.families.options import varies_image
from jaxdiff.guidance.base import Guidance, GuidanceScales
from jaxdiff.pipeline.batches import BatchInputs, ImageGenerator, Run
from jaxdiff.pipeline.compiled_model import (
    NO_TARGETS,
    CompiledModel,
    ConditioningPair,
    Networks,
    guided,
)
from jaxdiff.pipeline.nonfinite import NonFiniteImageError
from jaxdiff.pipeline.output import Settings, collect
from jaxdiff.pipeline.programs import BatchArray
from jaxdiff.pipeline.request import Requests
from jaxdiff.samplers.base import get_sampler
from jaxdiff.samplers.inversion import invert

# options of a call that an inversion, which runs all steps without random noise, does not read
UNREAD = (
    "mask",
    "latents",
    "seed",
    "eta",
    "strength",
    "denoising_start",
    "denoising_end",
    "classifier_scale",
    "clip_scale",
)


def inversion_options(
    image: ImageInput, options: Mapping[str, Any], family: Family
) -> dict[str, Any]:
    """The options of the requests of an inversion; InputError for those that it does not read."""
    if image is None:
        raise InputError("image: got None, expected the image to invert")
    for name in UNREAD:
        if (value := options.get(name)) is not None:
            raise InputError(f"{name}: got {value!r:.60}, expected none for an inversion")
    given = {name: value for name, value in options.items() if value is not None}
    chosen = {"guidance_scale": 1.0, "sampler": "ddim"} | given
    sampler = get_sampler(chosen["sampler"])
    if sampler.stochastic or any(getattr(sampler, each) for each in sampler.stochastic_options):
        raise InputError(
            f"sampler: got {chosen['sampler']!r}, expected one that adds no noise for an inversion"
        )
    name = "original_image" if family.enlarges or varies_image(family) else "image"
    return chosen | {name: image, "strength": 1.0}  # all steps


class ImageInverter(ImageGenerator):
    """Batches that go from initial images up to noise, where those of calls go down."""

    def invert(self, requests: Requests, batch_size: int | None) -> Float[NDArray, "b h w c"]:
        """The unit-variance noise of each request."""
        settings = Settings(output="latent", batch_size=batch_size)
        out = collect(requests, list(self.generate(requests, settings)), settings)
        if out.failures:
            raise NonFiniteImageError(out)
        return out.images

    def _failure(self, inputs: BatchInputs, run: Run, row: int) -> str:
        """An inversion has no intermediate steps to look at."""
        del inputs, run, row
        return "on the way to noise"

    def _denoise(
        self, inputs: BatchInputs, run: Run
    ) -> tuple[BatchArray, Float[NDArray, "b n 2 h w c"]]:
        """The noise, still on the devices, and no intermediate steps."""
        with run.timer("encode_s"):
            conditioning, latents, _ = self._conditioning(inputs, run)
        with run.timer("sample_s"):
            noise = _invert(
                self._stages, latents, conditioning, inputs.own.scales, inputs.own.grid, run.rule
            )
        return noise, np.zeros((len(run.requests), 0, 2, 1, 1, 1), np.float32)


def _invert(
    model: CompiledModel,
    latents: BatchArray | None,
    conditioning: ConditioningPair,
    scales: GuidanceScales,
    grid: TimestepGrid,
    rule: Guidance,
) -> BatchArray:
    """The noise that leads to `latents`, on the devices of a model."""
    networks, params = model.networks(rule, NO_TARGETS)
    model.layout.check_streams(len(grid.first), rule)
    levels, w = model.shard((grid, scales))
    rule = model.layout.replicate(jax.tree.map(np.float32, rule))
    program = model.program(invert_latents, "..bbbb", networks=networks)
    return program(params, rule, latents, conditioning, w, levels)


def invert_latents(
    params: Networks,
    rule: Guidance,
    latents: Array,
    conditioning: ConditioningPair,
    scales: GuidanceScales,
    grid: TimestepGrid,
    *,
    networks: Networks,
) -> Array:
    """The unit-variance noise that leads to `latents` on the grid; see `samplers.invert`."""
    denoise = guided(params, rule, conditioning, scales, networks)
    return invert(denoise, latents, grid, guidance_state=rule.init_state(latents))


class Invertible:
    """A model that leads images back to the noise which they come from."""

    @rename_arguments
    def invert(
        self: Any,
        image: ImageInput,
        prompt: str | Sequence[str] = "",
        *,
        batch_size: int | None = None,
        **options: Any,
    ) -> Float[NDArray, "b h w c"]:
        """DDIM inversion: noise that leads to `image` as `latents` of a call with these options.

        By default the guidance scale is 1 and the sampler ddim. The way back has errors of first
        order in the length of the steps, which guidance enlarges. Raises InputError.
        """
        requests = self.resolve(prompt, **inversion_options(image, options, self.family))
        inverter = ImageInverter(self._facts, self.stages, self._tokenizers, self._auxiliary)
        return inverter.invert(requests, batch_size)
