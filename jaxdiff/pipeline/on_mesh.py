"""Weights and work shared by the devices of a mesh."""

import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
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
from jaxdiff.pipeline.programs import BatchArray, Layout, ModuleGraph, of_leaves


@dataclasses.dataclass(frozen=True)
class ShardedModuleGraph(ModuleGraph):
    """A module without its weights, which are gathered where they are used."""

    mesh: Mesh

    def __call__(self, params: PyTree) -> Any:
        return super().__call__(all_gather_fsdp(params, infer_shardings(params, self.mesh)))


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
        x: Float[Array, "n *space c"],
        t: Float[Array, "n"] | Int[Array, "n"],
        cond: PyTree,
        *,
        variance: bool = False,
        **options: Any,
    ) -> Float[Array, "n *space o"]:
        """The output of the adapter, each image's on the devices of that image."""
        rows = batch_sharding(self.mesh)
        if splits_streams(self.mesh, len(x)):
            rows = NamedSharding(self.mesh, PartitionSpec((DATA, FSDP, GUIDANCE)))
        if self.mesh.shape[FSDP] > 1:
            # Weights alone would be gathered before the loop, and every device would keep them all.
            params, x = lax.optimization_barrier((params, x))
            params = all_gather_fsdp(params, infer_shardings(params, self.mesh))
        inputs = lax.with_sharding_constraint((x, t, cond, options), rows)
        asked = {"variance": True} if variance else {}
        output = self.adapter(params, *inputs[:3], **asked, **inputs[3])
        return lax.with_sharding_constraint(output, batch_sharding(self.mesh))

    @property
    def prediction_type(self) -> str:
        """That of the adapter."""
        return self.adapter.prediction_type

    @property
    def learns_variance(self) -> bool:
        """Whether the adapter's network does."""
        return self.adapter.learns_variance


class OnMesh(Layout):
    """Weights and work shared by the devices of a mesh: `jax.jit` with NamedSharding.

    Arrays of a batch are (b, ...). Weights lie where the tables of `parallel.sharding` say, which
    they must do before.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(list(mesh.devices.flat), num_batch_shards(mesh))
        self._mesh = mesh
        self.sharding = functools.partial(infer_sharding, mesh=mesh)

    @property
    def mesh(self) -> Mesh:
        """The mesh."""
        return self._mesh

    def __str__(self) -> str:
        return "mesh " + ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())

    def network(self, adapter: Any) -> NetworkOnMesh:
        """A denoiser's adapter, as the sampling loop calls it."""
        return NetworkOnMesh(adapter, self.mesh)

    def split(self, module: nnx.Module) -> tuple[ModuleGraph, PyTree]:
        """A module as its graph and its weights."""
        graph, params = nnx.split(module)
        return ShardedModuleGraph(graph, self.mesh), params

    def weight_shardings(self, params: PyTree) -> PyTree:
        """Where each of these weights lies, by the tables of `parallel.sharding`."""
        return infer_shardings(params, self.mesh)

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
        run = of_leaves(function, arguments)

        def on_mesh(*leaves: Any) -> Any:
            # Kernels that the compiler cannot partition look up the mesh.
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return run(*leaves)

        return jax.jit(on_mesh, out_shardings=batch_sharding(self.mesh))
