"""Text encoders whose weights are on the devices only while prompts are encoded."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxdiff.checkpoints.loading import place_weight
from jaxdiff.core.types import PyTree
from jaxdiff.core.validate import one_of
from jaxdiff.pipeline.auxiliary_models import AuxiliaryModels
from jaxdiff.pipeline.compiled_model import CompiledModel
from jaxdiff.pipeline.conditioning import Conditioning, EncodedPrompts, TokenizedPrompts

TEXT = "text"
OFFLOADS = (TEXT,)  # what can leave the devices while it is not needed
ENCODED_AHEAD = 2**30  # bytes of encoded prompts that are on the host at a time


def check_offload(offload: str | None) -> str | None:
    """Return `offload` if it is None or one of OFFLOADS; InputError otherwise."""
    return None if offload is None else one_of("offload", offload, OFFLOADS)


class OffloadedModel(CompiledModel):
    """A model whose text encoders stay on the host.

    Their weights are copied to the devices to encode prompts, and the copies are freed then.
    """

    offloads_text = True
    _on_host: list[Any] | None = None  # the text encoders with their own weights, while copied

    @contextlib.contextmanager
    def text_encoders_on_devices(self) -> Iterator[None]:
        """Hold copies of the text encoders' weights on the devices; inside another, the same."""
        if self._on_host is not None:
            yield
            return
        copies: list[jax.Array] = []
        self._on_host = self._texts
        try:
            self._texts = [(graph, self._copied(own, copies)) for graph, own in self._on_host]
            yield
        finally:
            self._texts, self._on_host = self._on_host, None
            for copy in copies:
                copy.delete()

    def _copied(self, params: PyTree, copies: list[jax.Array]) -> PyTree:
        """The weights on the devices; each copy joins `copies` as soon as it is made."""

        def copy(weight: Any, place: jax.sharding.Sharding) -> jax.Array:
            # By way of numpy: JAX may give an array of a device its own buffer again as the copy.
            copies.append(place_weight(np.asarray(weight), place))
            return copies[-1]

        return jax.tree.map(copy, params, self.layout.weight_shardings(params))

    def encode_text(self, prompts: TokenizedPrompts, *, skip: int) -> Conditioning:
        """The texts' part of the conditioning, with weights that are freed when it is there."""
        with self.text_encoders_on_devices():
            return jax.block_until_ready(super().encode_text(prompts, skip=skip))


def encode_ahead(
    stages: CompiledModel, auxiliary: AuxiliaryModels, batches: Iterable[tuple[Any, int]]
) -> Iterator[Any]:
    """The prompts of the first of `batches`, encoded, up to ENCODED_AHEAD bytes on the host.

    A batch has its `BatchPrompts` and how many layers to skip. The text encoders of the model, and
    of a weaker one that guides it, come to the devices once for all of them.
    """
    guide = auxiliary.guidance_model
    weaker = None if guide is None else guide.stages
    encoded_bytes = 0
    with contextlib.ExitStack() as stack:
        for each in (stages, weaker):
            if isinstance(each, OffloadedModel):
                stack.enter_context(each.text_encoders_on_devices())
        for prompts, skip in batches:
            if encoded_bytes >= ENCODED_AHEAD:
                return
            encoded = prompts._replace(main=_on_host(stages, prompts.main, skip))
            if weaker is not None and prompts.guidance_model is not None:
                own = _on_host(weaker, prompts.guidance_model, skip)
                encoded = encoded._replace(guidance_model=own)
            encoded_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(encoded))
            yield encoded


def _on_host(stages: CompiledModel, prompts: TokenizedPrompts, skip: int) -> EncodedPrompts:
    return EncodedPrompts(jax.tree.map(stages.gather, stages.encode_text(prompts, skip=skip)))
