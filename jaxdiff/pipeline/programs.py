"""How the functions of a model run on devices: compiled, under `jax.pmap` or on a mesh.

The functions never know which layout runs them; `on_mesh` has the other one.
"""

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from jaxdiff.core.timing import note_compiling
from jaxdiff.core.types import Array, NDArray, PyTree
from jaxdiff.guidance.base import Guidance
from jaxdiff.parallel.mesh import batch_sharding, data_mesh, replicated

BatchArray = Array | NDArray  # of a batch, in the form of a layout


@dataclasses.dataclass(frozen=True)
class ModuleGraph:
    """A module without its weights; called with them, it is the module."""

    graph: nnx.GraphDef[Any]

    def __call__(self, params: PyTree) -> Any:
        return nnx.merge(self.graph, params)


class Layout(ABC):
    """Where weights and batches lie on the devices, and how a function runs there.

    Arrays of a batch stay on the devices, in the form of the layout, from one function to the next.
    """

    # of weights by path and shape, as `read_component` takes it; None: whole, on the default device
    sharding: Callable[[str, tuple[int, ...]], Sharding] | None = None

    def __init__(self, devices: Sequence[jax.Device], num_shards: int) -> None:
        self.devices, self.num_shards = list(devices), num_shards  # shards of a batch

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the devices, if they are one."""
        return None

    def network(self, adapter: Any) -> Any:
        """A denoiser's adapter, as the sampling loop calls it."""
        return adapter

    def split(self, module: nnx.Module) -> tuple[ModuleGraph, PyTree]:
        """A module as its graph and its weights."""
        graph, params = nnx.split(module)
        return ModuleGraph(graph), params

    @abstractmethod
    def shard(self, tree: PyTree) -> PyTree:
        """Arrays (b, ...) of the host in the form of the layout."""

    @abstractmethod
    def gather(self, array: BatchArray) -> NDArray:
        """An array of a batch as (b, ...) on the host."""

    def replicate(self, tree: PyTree) -> PyTree:
        """Arrays that all devices get."""
        return tree

    def check_streams(self, images: int, rule: Guidance) -> None:
        """Warn if devices have no part in the guidance streams of a batch of so many images."""
        del images, rule

    @abstractmethod
    def weight_shardings(self, params: PyTree) -> PyTree:
        """Where each of these weights lies on the devices, for `jax.device_put`."""

    @abstractmethod
    def jit(
        self, function: Callable[..., Any], per_image: Sequence[bool], arguments: Sequence[PyTree]
    ) -> Any:
        """`function`, to be compiled, of the leaves of such `arguments`.

        `per_image` says of each argument whether its leading axis is the batch's.
        """


class DataParallel(Layout):
    """All weights on each of the devices, which share a batch: `jax.pmap` over the axis "data".

    Arrays of a batch are (devices, b / devices, ...).
    """

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        super().__init__(devices, len(devices))
        self._mesh = data_mesh(self.devices)
        self._place = batch_sharding(self._mesh)

    def __str__(self) -> str:
        return "no mesh"

    def weight_shardings(self, params: PyTree) -> PyTree:
        """Where each of these weights lies: whole on each of the devices."""
        place = replicated(self._mesh)
        return jax.tree.map(lambda _: place, params)

    def shard(self, tree: PyTree) -> PyTree:
        """Arrays (b, ...) of the host in the form of the layout."""
        split = jax.tree.map(lambda x: x.reshape(self.num_shards, -1, *x.shape[1:]), tree)
        return jax.device_put(split, self._place)

    def gather(self, array: BatchArray) -> NDArray:
        """An array of a batch as (b, ...) on the host."""
        host = np.asarray(array)
        return host.reshape(-1, *host.shape[2:])

    def jit(
        self, function: Callable[..., Any], per_image: Sequence[bool], arguments: Sequence[PyTree]
    ) -> Any:
        """The mapped function of the leaves of such `arguments`.

        Of leaves, since pmap takes axes for arguments to be those of leaves where there happen to
        be equally many, which None among the arguments brings about.
        """
        leaves = [len(jax.tree.leaves(argument)) for argument in arguments]
        axes = np.repeat(np.array([0 if own else None for own in per_image], object), leaves)
        run = of_leaves(function, arguments)
        return jax.pmap(run, axis_name="data", in_axes=tuple(axes), devices=self.devices)


def of_leaves(function: Callable[..., Any], arguments: Sequence[PyTree]) -> Callable[..., Any]:
    """`function`, called with the leaves of such `arguments`."""
    structure = jax.tree.structure(tuple(arguments))
    return lambda *leaves: function(*jax.tree.unflatten(structure, leaves))


class CompiledFunction:
    """A pure function compiled for a layout, one executable per shapes; counts compile seconds.

    `per_image` says for each argument whether its leading axis is the batch's (True) or whether it
    is the same for all images (False): weights and loop bounds. `precision` is that of products of
    float32 matrices, as `jax.default_matmul_precision` takes it, and `options` are the compiler's.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        per_image: Sequence[bool],
        layout: Layout,
        *,
        precision: str | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._function, self._per_image = function, tuple(per_image)
        self._layout, self._precision, self._options = layout, precision, options
        self._executables: dict[Any, Any] = {}
        self.compile_s = 0.0

    def __call__(self, *arguments: PyTree) -> Any:
        """Run on `arguments`, compiling first where these shapes are new."""
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, tuple((np.shape(x), jax.numpy.result_type(x)) for x in leaves)
        if key not in self._executables:
            started = time.perf_counter()
            with jax.default_matmul_precision(self._precision):
                jitted = self._layout.jit(self._function, self._per_image, arguments)
                self._executables[key] = jitted.lower(*leaves).compile(self._options)
            self.compile_s += note_compiling(time.perf_counter() - started)
        return self._executables[key](*leaves)

    @property
    def compilations(self) -> int:
        """How many executables there are: one per set of argument shapes."""
        return len(self._executables)
