"""The weights of the text encoders on the devices: always, or only while prompts are encoded."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxdiff.checkpoints.loading import place_weight
from jaxdiff.core.types import PyTree
from jaxdiff.core.validate import one_of
from jaxdiff.pipeline.programs import Layout, ModuleGraph

TEXT = "text"
OFFLOADS = (TEXT,)  # what can leave the devices while it is not needed


def check_offload(offload: str | None) -> str | None:
    """Return `offload` if it is None or one of OFFLOADS; InputError otherwise."""
    return None if offload is None else one_of("offload", offload, OFFLOADS)


class TextWeights:
    """The text encoders of a model as graphs and weights.

    With `offload` "text" the weights are copied to the devices for `on_devices` alone, and stay
    where they are, on the host, otherwise.
    """

    def __init__(self, layout: Layout, offload: str | None) -> None:
        self.offloaded = check_offload(offload) == TEXT
        self._layout = layout
        self._graphs: tuple[ModuleGraph, ...] = ()
        self._params: tuple[PyTree, ...] = ()
        self._placed: tuple[PyTree, ...] | None = None  # copies on the devices

    def __len__(self) -> int:
        return len(self._graphs)

    def set(self, encoders: Sequence[Any]) -> None:
        """Use the weights that these modules have now."""
        halves = [self._layout.split(encoder) for encoder in encoders]
        self._graphs = tuple(graph for graph, _ in halves)
        self._params = tuple(params for _, params in halves)

    @contextlib.contextmanager
    def on_devices(self) -> Iterator[tuple[tuple[ModuleGraph, ...], tuple[PyTree, ...]]]:
        """Graphs and weights to compute with; copies of offloaded weights are freed at the end.

        Inside another `on_devices` nothing is copied again.
        """
        if not self.offloaded or self._placed is not None:
            yield self._graphs, self._params if self._placed is None else self._placed
            return
        copies: list[jax.Array] = []
        try:
            self._placed = self._copied(copies)
            yield self._graphs, self._placed
        finally:
            self._placed = None
            for copy in copies:
                copy.delete()

    def _copied(self, copies: list[jax.Array]) -> tuple[PyTree, ...]:
        """The weights on the devices; each copy joins `copies` as soon as it is made."""

        def copy(weight: Any, place: jax.sharding.Sharding) -> jax.Array:
            # By way of numpy: JAX may give an array of a device its own buffer again as the copy.
            copies.append(place_weight(np.asarray(weight), place))
            return copies[-1]

        return jax.tree.map(copy, self._params, self._layout.weight_shardings(self._params))
