"""A stage that makes images of the embeddings that a prior generates (unCLIP, 2204.06125)."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray
from jaxdiff.families.image_embeddings import IMAGE_EMBEDS, NEGATIVE, reads_negative
from jaxdiff.pipeline.image_encoder import zero_image_embedding
from jaxdiff.pipeline.nonfinite import NonFiniteImageError
from jaxdiff.pipeline.output import Output
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.pipeline.request import Request
from jaxdiff.pipeline.stages import (
    FROM_CALL,
    ModelStage,
    Stage,
    SuperResolution,
    with_zeros,
)


def following_stage(
    pipe: Pipeline, first: Pipeline, options: Mapping[str, Any] = MappingProxyType({})
) -> Stage:
    """The stage of a model that follows `first`, or others after it; InputError if it cannot."""
    if reads_embeddings(pipe):
        return EmbeddingDecoder(pipe, first, options)
    return SuperResolution(pipe, options)


def check_stages(first: Pipeline, stages: Sequence[Stage]) -> None:
    """InputError for stages that need images where `first` is a prior, which generates none."""
    if first.family.embeddings is not None and stages and not stages[0].takes_embeddings:
        raise InputError(
            f"{stages[0].option}: got it for {first.family.name}, which generates embeddings, "
            "expected a decoder after it"
        )


def reads_embeddings(pipe: Pipeline) -> bool:
    """Whether a model makes images of embeddings of images."""
    return IMAGE_EMBEDS in pipe.family.options


@dataclasses.dataclass(frozen=True)
class EmbeddingDecoder(ModelStage):
    """A model that makes images of the embeddings of a `prior`, with `options` of its own.

    Its streams without prompts read the embedding that the prior makes of the negative prompt, or
    without one that of an image of zeros, unless the model has another for them. It has the seeds
    of the call, and its prompts where it reads texts. InputError for models that do not go
    together.
    """

    pipe: Pipeline
    prior: Pipeline
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    takes_embeddings = True

    def __post_init__(self) -> None:
        width = self.prior.codec.config.latent_channels
        if self.prior.family.embeddings is None or not reads_embeddings(self.pipe):
            raise InputError(
                f"then: got {self.pipe.name} ({self.pipe.family.name}) after {self.prior.name} "
                f"({self.prior.family.name}), expected a decoder after a prior"
            )
        embedding = np.zeros(width, np.float32)
        own = {IMAGE_EMBEDS, NEGATIVE} & self.pipe.family.options.keys()
        self.check_options({*FROM_CALL, *own}, **dict.fromkeys(own, embedding))

    def run(self, previous: Output, arguments: Mapping[str, Any], **settings: Any) -> Output:
        """Go on from the embeddings of a batch."""
        images = np.asarray(previous.images)
        given = {IMAGE_EMBEDS: images}
        if NEGATIVE in self.pipe.family.options:  # zeros for now
            given[NEGATIVE] = np.zeros_like(images)
        requests = self.pipe.resolve(**self.from_call(arguments), **cast(Any, given))
        guided = [NEGATIVE in given and reads_negative(vars(each)) for each in requests]
        prompts = {i: previous.requests[i] for i in np.flatnonzero(guided).tolist()}
        negative, failures = self._negative_embeddings(prompts, settings)
        own = [
            dataclasses.replace(each, extras=_with_negative(each.extras, negative.get(i)))
            for i, each in enumerate(requests)
        ]
        out = _with_failures(self.pipe, own, settings)
        return dataclasses.replace(out, failures={**failures, **out.failures})

    def _negative_embeddings(
        self, requests: Mapping[int, Request], settings: Mapping[str, Any]
    ) -> tuple[dict[int, Float[NDArray, "d"]], dict[int, str]]:
        """What the prior makes of the negative prompts, or without one of an image of zeros.

        And why some of it is not finite: it is zeros. Both are by image, as `requests` are.
        """
        embeddings: dict[int, Any] = {}
        failures: dict[int, str] = {}
        having = [i for i, each in requests.items() if each.negative_prompt is not None]
        if having:
            negatives = [
                dataclasses.replace(requests[i], prompt=requests[i].negative_prompt or "")
                for i in having
            ]
            made = _with_failures(self.prior, negatives, {**settings, "output": "numpy"})
            failures = {having[i]: why for i, why in made.failures.items()}
            rows = zip(having, with_zeros(made).images, strict=True)
            embeddings = dict(rows)
        if len(having) < len(requests):
            zero = zero_image_embedding(self.prior)[0]
            embeddings = dict.fromkeys(requests, zero) | embeddings
        return embeddings, failures


def _with_negative(
    extras: Mapping[str, Any], negative: Float[NDArray, "d"] | None
) -> dict[str, Any]:
    """The options of a request with another negative embedding, or without one."""
    others = {name: value for name, value in extras.items() if name != NEGATIVE}
    return others if negative is None else {**others, NEGATIVE: negative}


def _with_failures(
    pipe: Pipeline, requests: Sequence[Request], settings: Mapping[str, Any]
) -> Output:
    """The output also where some of it is not finite."""
    try:
        return pipe.generate(requests, **settings)
    except NonFiniteImageError as error:
        return error.output
