"""How the functions of a model run on devices: under `jax.pmap`, or under `jax.jit` on a mesh.

The two layouts have the same methods, and the functions never know which of them runs them. Arrays
of a batch stay on the devices, in the form of the layout, from one function to the next.
"""

import dataclasses
import functools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff.core.types import Array, Float, Int, NDArray, PyTree
from jaxdiff.guidance.base import Guidance
from jaxdiff.parallel.mesh import (
    DATA,
    FSDP,
    GUIDANCE,
    batch_sharding,
    num_batch_shards,
    replicate,
)
from jaxdiff.parallel.sharding import all_gather_fsdp, infer_sharding, infer_shardings

BatchArray = Array | NDArray  # of a batch, in the form of a layout


@dataclasses.dataclass(frozen=True)
class ModuleGraph:
    """A module without its weights; called with them, it is the module.

    On a `mesh` that splits weights over "fsdp", they are gathered where they are used.
    """

    graph: nnx.GraphDef[Any]
    mesh: Mesh | None = None

    def __call__(self, params: PyTree) -> Any:
        if self.mesh is not None:
            params = all_gather_fsdp(params, infer_shardings(params, self.mesh))
        return nnx.merge(self.graph, params)


def splits_streams(mesh: Mesh, rows: int) -> bool:
    """Whether "guidance" takes part in splitting the rows, images times streams, of a network."""
    return GUIDANCE in mesh.shape and rows % (num_batch_shards(mesh) * mesh.shape[GUIDANCE]) == 0


@dataclasses.dataclass(frozen=True)
class NetworkOnMesh:
    """The adapter of a denoiser on a mesh, which splits its rows: images, and their streams.

    Where "guidance" does not divide the rows, its devices repeat one another's work.
    """

    adapter: Any
    mesh: Mesh

    def __call__(
        self,
        params: PyTree,
        x: Float[Array, "n h w c"],
        t: Float[Array, "n"] | Int[Array, "n"],
        cond: PyTree,
        **options: Any,
    ) -> Float[Array, "n h w o"]:
        """The output of the adapter, each image's on the devices of that image."""
        rows = batch_sharding(self.mesh)
        if splits_streams(self.mesh, len(x)):
            rows = NamedSharding(self.mesh, PartitionSpec((DATA, FSDP, GUIDANCE)))
        if self.mesh.shape[FSDP] > 1:
            # Weights alone would be gathered before the loop, and every device would keep them all.
            params, x = lax.optimization_barrier((params, x))
            params = all_gather_fsdp(params, infer_shardings(params, self.mesh))
        inputs = lax.with_sharding_constraint((x, t, cond, options), rows)
        output = self.adapter(params, *inputs[:3], **inputs[3])
        return lax.with_sharding_constraint(output, batch_sharding(self.mesh))

    @property
    def prediction_type(self) -> str:
        """That of the adapter."""
        return self.adapter.prediction_type


class DataParallel:
    """All weights on each of the devices, which share a batch: `jax.pmap` over the axis "data".

    Arrays of a batch are (devices, b / devices, ...).
    """

    mesh = sharding = None  # the latter is of weights, as `read_component` takes it

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self._devices = list(devices)
        self.num_shards = len(self._devices)  # of a batch

    def __str__(self) -> str:
        return "no mesh"

    def network(self, adapter: Any) -> Any:
        """A denoiser's adapter, as the sampling loop calls it."""
        return adapter

    def split(self, module: nnx.Module) -> tuple[ModuleGraph, PyTree]:
        """A module as its graph and its weights."""
        graph, params = nnx.split(module)
        return ModuleGraph(graph), params

    def shard(self, tree: PyTree) -> PyTree:
        """Arrays (b, ...) of the host in the form of the layout."""
        return jax.tree.map(lambda x: x.reshape(self.num_shards, -1, *x.shape[1:]), tree)

    def replicate(self, tree: PyTree) -> PyTree:
        """Arrays that all devices get."""
        return tree

    def check_streams(self, images: int, rule: Guidance) -> None:
        """Nothing: an image's streams are on its device."""

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
        axes = [
            0 if own else None
            for own, argument in zip(per_image, arguments, strict=True)
            for _ in jax.tree.leaves(argument)
        ]
        run = _of_leaves(function, arguments)
        return jax.pmap(run, axis_name="data", in_axes=tuple(axes), devices=self._devices)


class OnMesh:
    """Weights and work shared by the devices of a mesh: `jax.jit` with NamedSharding.

    Arrays of a batch are (b, ...). Weights lie where the tables of `parallel.sharding` say, which
    they must do before.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.sharding = functools.partial(infer_sharding, mesh=mesh)
        self.num_shards = num_batch_shards(mesh)  # of a batch

    def __str__(self) -> str:
        return "mesh " + ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())

    def network(self, adapter: Any) -> NetworkOnMesh:
        """A denoiser's adapter, as the sampling loop calls it."""
        return NetworkOnMesh(adapter, self.mesh)

    def split(self, module: nnx.Module) -> tuple[ModuleGraph, PyTree]:
        """A module as its graph and its weights."""
        graph, params = nnx.split(module)
        return ModuleGraph(graph, self.mesh), params

    def shard(self, tree: PyTree) -> PyTree:
        """Arrays (b, ...) of the host in the form of the layout."""
        return jax.device_put(tree, batch_sharding(self.mesh))

    def replicate(self, tree: PyTree) -> PyTree:
        """Arrays that all devices get."""
        return replicate(tree, self.mesh)

    def check_streams(self, images: int, rule: Guidance) -> None:
        """Warn if the axis "guidance" has nothing to share in a batch of so many images."""
        for name, streams in Counter(stream.network for stream in rule.streams).items():
            if GUIDANCE in self.mesh.shape and not splits_streams(self.mesh, images * streams):
                warnings.warn(
                    f"mesh.guidance: {self.mesh.shape[GUIDANCE]} devices repeat each other's work: "
                    f"they cannot share {images} x {streams} guidance streams ({name} network)",
                    stacklevel=2,
                )

    def gather(self, array: BatchArray) -> NDArray:
        """An array of a batch as (b, ...) on the host."""
        return jax.device_get(array)

    def jit(
        self, function: Callable[..., Any], per_image: Sequence[bool], arguments: Sequence[PyTree]
    ) -> Any:
        """The function of the leaves of such `arguments`, which say where they lie themselves."""
        del per_image
        run = _of_leaves(function, arguments)

        def on_mesh(*leaves: Any) -> Any:
            # Kernels that the compiler cannot partition look up the mesh.
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return run(*leaves)

        return jax.jit(on_mesh, out_shardings=batch_sharding(self.mesh))


Layout = DataParallel | OnMesh


def _of_leaves(function: Callable[..., Any], arguments: Sequence[PyTree]) -> Callable[..., Any]:
    """`function`, called with the leaves of such `arguments`."""
    structure = jax.tree.structure(tuple(arguments))
    return lambda *leaves: function(*jax.tree.unflatten(structure, leaves))


class CompiledFunction:
    """A pure function compiled for a layout, one executable per shapes; counts compile seconds.

    `per_image` says for each argument whether its leading axis is the batch's (True) or whether it
    is the same for all images (False): weights and loop bounds. `precision` is that of products of
    float32 matrices, as `jax.default_matmul_precision` takes it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        per_image: Sequence[bool],
        layout: Layout,
        *,
        precision: str | None = None,
    ) -> None:
        self._function, self._per_image = function, tuple(per_image)
        self._layout, self._precision = layout, precision
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
                self._executables[key] = jitted.lower(*leaves).compile()
            self.compile_s += time.perf_counter() - started
        return self._executables[key](*leaves)

    @property
    def compilations(self) -> int:
        """How many executables there are: one per set of argument shapes."""
        return len(self._executables)
