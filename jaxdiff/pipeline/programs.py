"""Functions compiled for all local devices, with separate compilation times."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxdiff.core.types import PyTree


class CompiledFunction:
    """A pure function under `jax.pmap` over `devices` (axis "data"), one executable per shapes.

    `per_device` says for each argument whether its leading axis is the devices' (True) or whether
    it is the same on all of them (False): weights and loop bounds. `precision` is that of products
    of float32 matrices, as `jax.default_matmul_precision` takes it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        per_device: Sequence[bool],
        devices: Sequence[jax.Device],
        *,
        precision: str | None = None,
    ) -> None:
        self._function, self._per_device = function, tuple(per_device)
        self._devices, self._precision = devices, precision
        self._executables: dict[Any, Any] = {}
        self.compile_s = 0.0

    def __call__(self, *arguments: PyTree) -> Any:
        """Run on `arguments`, compiling first where these shapes are new."""
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, tuple((np.shape(x), jax.numpy.result_type(x)) for x in leaves)
        if key not in self._executables:
            started = time.perf_counter()
            with jax.default_matmul_precision(self._precision):
                self._executables[key] = self._mapped(arguments).lower(*leaves).compile()
            self.compile_s += time.perf_counter() - started
        return self._executables[key](*leaves)

    def _mapped(self, arguments: tuple[PyTree, ...]) -> Any:
        """The mapped function of the leaves of such `arguments`.

        Of leaves, since pmap takes axes for arguments to be those of leaves where there happen to
        be equally many, which None among the arguments brings about.
        """
        structure = jax.tree.structure(arguments)
        axes = [
            0 if own else None
            for own, argument in zip(self._per_device, arguments, strict=True)
            for _ in jax.tree.leaves(argument)
        ]

        def run(*leaves: Any) -> Any:
            return self._function(*jax.tree.unflatten(structure, leaves))

        return jax.pmap(run, axis_name="data", in_axes=tuple(axes), devices=self._devices)

    @property
    def compilations(self) -> int:
        """How many executables there are: one per set of argument shapes."""
        return len(self._executables)


def shard_leading_axis(tree: PyTree, devices: int) -> PyTree:
    """(b, ...) leaves as (devices, b / devices, ...)."""
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), tree)


def gather_leading_axis(array: Any) -> np.ndarray:
    """(devices, b, ...) on the devices as (devices * b, ...) on the host."""
    host = np.asarray(array)
    return host.reshape(-1, *host.shape[2:])
