"""`Pipeline`: a loaded model that generates images from prompts."""

import dataclasses
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Unpack, cast

from jaxdiff.core.aliases import rename_arguments
from jaxdiff.core.errors import InputError
from jaxdiff.data.image_arrays import ImageInput
from jaxdiff.pipeline import image_inputs
from jaxdiff.pipeline.compiled_model import ProgressCallback
from jaxdiff.pipeline.diffusers_arguments import lists_options, without_replaced
from jaxdiff.pipeline.inversion import Invertible
from jaxdiff.pipeline.loaded_model import LoadedModel
from jaxdiff.pipeline.nonfinite import NonFiniteImageError
from jaxdiff.pipeline.notebook import notebook_progress
from jaxdiff.pipeline.options import Options
from jaxdiff.pipeline.output import Output, check_sizes, collect, make_settings
from jaxdiff.pipeline.request import Request, Requests, check, resolve
from jaxdiff.pipeline.slots import ImagePreparer


class Pipeline(Invertible, LoadedModel):
    """A text-to-image model; `jaxdiff.load` makes one.

    `network` and `text_encoders` are modules that you can call; components also have their own
    names, such as `unet` and `vae`, and `text_encoder` is the first text encoder. Calling the
    pipeline runs them compiled on all of its devices.
    """

    @lists_options
    @rename_arguments
    def resolve(
        self,
        prompt: str | Sequence[str],
        *,
        image: ImageInput = None,
        original_image: ImageInput = None,
        mask: ImageInput = None,
        latents: Any = None,
        **options: Unpack[Options],
    ) -> Requests:
        """The complete requests that a call with these arguments would run; raises InputError."""
        if options.keys() - Options.__annotations__:
            listed = inspect.signature(type(self).__call__).parameters
            options = cast(Options, without_replaced(options, listed))
        facts, images, downscale = self._facts, {}, self.codec.config.downscale
        if any(given is not None for given in (image, original_image, mask)):
            own = image_inputs.own_images(self.family, image, original_image)
            images = image_inputs.by_request(own, mask, self.codec.config.latent_channels)
            sized = image_inputs.with_image_defaults(options, images, self.family, downscale)
            options = cast(Options, sized)
        requests = resolve(
            self.defaults,
            prompt,
            family=self.family,
            vae_scale_factor=downscale,
            network=facts.network,
            images=images,
            **options,
        )
        if latents is not None:
            requests = image_inputs.with_noise(requests, latents, facts.latent_shape(requests[0]))
        if "image" in images or options.get("denoising_end") is not None:
            facts.grid(requests)  # raises where no step is left
        return requests

    @lists_options
    @rename_arguments
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: ImageInput = None,
        original_image: ImageInput = None,
        mask: ImageInput = None,
        latents: Any = None,
        vae_tile: int | None = None,
        batch_size: int | None = None,
        output: str = "pil",
        callback: ProgressCallback | None = None,
        intermediate_steps: Sequence[int] = (),
        **options: Unpack[Options],
    ) -> Output:
        """Generate one image per prompt; a single prompt serves several seeds, scales or images.

        `options` are those of `options.Options`; None takes the model's default, which
        `pipe.defaults` has.

        image, mask: initial images (PIL, uint8, or files) that `strength` changes, or scaled
            latents. The mask is white where the image is repainted and black where it is kept.
            Models that enlarge or vary an image take that one as `image`, and as `original_image`
            what they change.
        latents: unit-variance noise (b, h, w, c) instead of that of the seeds.
        vae_tile: tile size of the VAE in pixels. By default images above tiling.MAX_UNTILED pixels
            use tiles of tiling.TILE pixels, and smaller ones none.
        batch_size: images per batch, all by default; a smaller last batch is padded to it.
        output: "pil", "numpy" (uint8) or "latent" (scaled).
        callback: called as `callback(done, steps)` while the sampling loop runs.
        intermediate_steps: steps, counted from 0, whose latents `Output.intermediates` has.

        `denoising_start` and `denoising_end` run only a part of the process, as fractions of it, so
        that another model can continue with the latents: x, and x / alpha with samplers of which
        diffusers' schedulers carry that, such as "euler" and "heun". Raises InputError.
        """
        images = {"image": image, "original_image": original_image, "mask": mask}
        return self.generate(
            self.resolve(prompt, **images, latents=latents, **options),
            vae_tile=vae_tile,
            batch_size=batch_size,
            output=output,
            callback=callback,
            intermediate_steps=intermediate_steps,
        )

    def generate(self, requests: Sequence[Request], **settings: Any) -> Output:
        """Generate the images of `requests`, such as `resolve` gives, with `settings` of a call.

        NonFiniteImageError, which has the output, where images are not finite.
        """
        own = make_settings(settings)
        self.check(requests)
        check_sizes(requests, own)
        in_notebook = "IPython" in sys.modules and own.callback is None
        with notebook_progress() if in_notebook else nullcontext(own.callback) as shown:
            own = dataclasses.replace(own, callback=shown)
            results = list(self._generator.generate(requests, own))
        out = collect(requests, results, own)
        if out.failures:
            raise NonFiniteImageError(out)
        return out

    def stream(
        self, requests: Sequence[Request], **settings: Any
    ) -> Iterator[tuple[list[int], Output]]:
        """Like `generate`, by batch: numbers of requests, and their output with its `failures`."""
        own = make_settings(settings)
        self.check(requests)
        for result in self._generator.generate(requests, own):
            part = [requests[i] for i in result.numbers]
            alone = result._replace(numbers=list(range(len(part))))
            yield result.numbers, collect(part, [alone], own)

    def preparer(self) -> ImagePreparer:
        """What encodes requests for `slots.Slots`, and decodes what comes of them."""
        return ImagePreparer(self._facts, self.stages, self._tokenizers, self._auxiliary)

    def check(self, requests: Sequence[Request]) -> None:
        """InputError for requests that this model cannot serve; loads what they need."""
        if not requests:
            raise InputError("requests: got none, expected at least one")
        for request in requests:
            if not isinstance(request, Request):
                got = f"requests: got {request!r:.60}"
                raise InputError(f"{got}, expected requests such as pipe.resolve gives")
            check(request, self.family, self._facts.network, self.codec.config.downscale)
        if any(request.classifier_scale or request.clip_scale for request in requests):
            self._auxiliary.load_missing(Requests(requests))
