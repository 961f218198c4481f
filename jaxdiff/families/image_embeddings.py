"""Embeddings of images as conditioning, which priors make of texts and CLIP of images."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, NDArray
from jaxdiff.core.validate import check_shape
from jaxdiff.families.extras import Extra, ExtraInputs, Option
from jaxdiff.guidance.base import parse

IMAGE_EMBEDS, NEGATIVE = "image_embeds", "negative_image_embeds"


class EmbeddingOption(Option):
    """An option that is an embedding (d,), or one (b, d) for each image."""

    def is_column(self, value: Any) -> bool:
        """Whether `value` has an embedding for each image."""
        return np.ndim(value) == 2

    def check(self, name: str, value: Any) -> Any:
        """`value`; InputError unless it is finite numbers."""
        if value is None:
            return None
        try:
            finite = np.isfinite(np.asarray(value, np.float32)).all()
        except (TypeError, ValueError):
            raise InputError(f"{name}: got {value!r:.60}, expected an array of numbers") from None
        if not finite or np.ndim(value) not in (1, 2):
            got = f"shape {np.shape(value)}" if finite else "numbers that are not finite"
            raise InputError(f"{name}: got {got}, expected embeddings (d,) or (b, d)")
        return tuple(value) if isinstance(value, list) else value


def reads_negative(settings: Mapping[str, Any]) -> bool:
    """Whether a request with these settings has streams without its prompt, which read NEGATIVE."""
    streams = parse(settings["guidance"]).streams
    return settings["guidance_scale"] != 1 and any(s.prompt_source != "prompt" for s in streams)


_OPTION = EmbeddingOption(Any, None, -np.inf, np.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEmbedding(Extra):
    """The embedding of an image of `width` (None: any), and in streams without prompts another.

    Such as that of a negative prompt, or of an image of zeros.
    """

    width: int | None = None

    argument = IMAGE_EMBEDS
    options: ClassVar[Mapping[str, Option]] = {IMAGE_EMBEDS: _OPTION, NEGATIVE: _OPTION}

    def check(self, settings: Mapping[str, Any], texts: Sequence[str]) -> None:
        """InputError for embeddings that are missing or of another width."""
        del texts
        for name in (IMAGE_EMBEDS, *((NEGATIVE,) if reads_negative(settings) else ())):
            if settings.get(name) is None:
                raise InputError(f"{name}: got none, expected the embedding of an image")
        for name in (IMAGE_EMBEDS, NEGATIVE):
            if self.width is not None and settings.get(name) is not None:
                check_shape(name, np.asarray(settings[name]), (self.width,))

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k d"]:
        names = [IMAGE_EMBEDS if prompted else NEGATIVE for prompted in inputs.prompted]
        # Without guidance an image has no other, though it may share a batch with those that do.
        rows = [[own.get(name, own[IMAGE_EMBEDS]) for name in names] for own in inputs.options]
        return np.asarray(rows, np.float32)

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b d"]:
        """The embedding of each image, or for those with `dropped` captions the negative one."""
        return jnp.where(dropped[:, None], batch[NEGATIVE], batch[IMAGE_EMBEDS])
