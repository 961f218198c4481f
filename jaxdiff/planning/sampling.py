"""Plans of generation: `generate.py --plan TOPOLOGY ... --model MODEL`.

Three programs run for a batch of images: the text encoders, the sampling loop and the decoder. Each
is compiled as the pipeline runs it, and what it needs beside the weights of the others decides
whether the model fits.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdiff.core.types import dtype_of
from jaxdiff.models.build import param_dict
from jaxdiff.parallel.mesh import FSDP, sampling_mesh
from jaxdiff.pipeline.offload import TEXT, check_offload
from jaxdiff.pipeline.on_mesh import OnMesh
from jaxdiff.pipeline.request import check_options
from jaxdiff.planning.compiling import compile_traced
from jaxdiff.planning.max_batch import max_batch_size
from jaxdiff.planning.report import FittingMesh, Plan, Planner, SamplingPlan
from jaxdiff.planning.sampled_model import CALL, SampledModel, SamplingOptions, sampled_model
from jaxdiff.planning.sampling_programs import (
    LOOP,
    TEXT_ENCODERS,
    place_weights,
    sampling_programs,
    shard_bytes,
    used_bytes,
)
from jaxdiff.planning.topology import Topology, topology_devices

MESH_TRIES = 2  # meshes that are compiled to find one on which a model fits


def sampling_planner(options: SamplingOptions) -> Planner:
    """The planner of generation with `options`; raises InputError."""
    check_options({name: getattr(options, name) for name in CALL})
    model = sampled_model(options)
    options = model.with_defaults(options)
    check_offload(options.offload)
    model.grid(options)  # raises InputError

    def plan(topology: Topology) -> SamplingPlan:
        devices = topology_devices(topology)
        # Without a mesh, one chip tells all: it has all weights, and shares nothing.
        shared = devices if options.mesh else devices[:1]
        on_mesh = _PlannedMesh(options, model, topology, sampling_mesh(options.mesh or {}, shared))
        each = -(-options.batch_size // on_mesh.batch_multiple)
        programs = on_mesh.compiled(each)
        total, max_batch, mesh = max(p.total for p in programs.values()), None, None
        if options.find_max_batch:
            measured = {each: total}
            fitting = max_batch_size(on_mesh.total, measured, topology.chip.hbm, 1)
            max_batch = on_mesh.batch_multiple * fitting
        if total > topology.chip.hbm:
            mesh = _fitting_mesh(on_mesh, devices, each, total)
        return SamplingPlan(
            topology=topology,
            batch_size=each * on_mesh.batch_multiple,
            programs=programs,
            weights=on_mesh.weights,
            offload=options.offload,
            max_batch_size=max_batch,
            fitting_mesh=mesh,
        )

    return plan


class _PlannedMesh:
    """The programs of a model on one mesh of a topology."""

    def __init__(
        self, options: SamplingOptions, model: SampledModel, topology: Topology, mesh: Mesh
    ) -> None:
        self.options, self.model, self.topology, self.mesh = options, model, topology, mesh
        self._layout = OnMesh(mesh)
        # images that all chips generate where each shard of a batch has one
        self.batch_multiple = self._layout.num_shards * (topology.num_chips // mesh.size)
        self._programs = sampling_programs(options, model, self._layout)
        self.weights = {
            name: shard_bytes(place_weights(param_dict(module), mesh))
            for name, module in model.components.items()
        }

    def compiled(self, each: int) -> dict[str, Plan]:
        """The programs for `each` images of every shard of a batch, by name."""
        return {name: self._compiled(name, each) for name in self._programs}

    def total(self, each: int) -> float:
        """The most bytes that a chip needs for `each` images of every shard of a batch."""
        return max(plan.total for plan in self.compiled(each).values())

    def resident(self, program: str) -> float:
        """Bytes of all weights that a chip holds while a program runs."""
        absent = self.options.offload == TEXT and program != TEXT_ENCODERS
        texts = self.model.text_encoders if absent else ()
        return sum(size for name, size in self.weights.items() if name not in texts)

    def _compiled(self, name: str, each: int) -> Plan:
        program, images = self._programs[name], each * self.batch_multiple
        model_flops = program.flops(images) / self.topology.num_chips
        with jax.default_matmul_precision(
            "highest" if dtype_of(self.options.dtype) == jnp.float32 else None
        ):
            traced = program.trace(each * self._layout.num_shards)
            transformer = name == LOOP and self.model.network.is_transformer
            compiled = compile_traced(traced, self.topology, transformer=transformer)
        if name == LOOP:  # that over the steps, of which the plan is of one
            compiled = compiled._replace(unknown_loops=compiled.unknown_loops - 1)
        own = used_bytes(traced, program.weights)
        return Plan(
            topology=self.topology,
            batch_size=images,
            compiled=compiled,
            model_flops=model_flops,
            state_bytes={"weights": shard_bytes(program.weights)},
            resident_bytes=self.resident(name) - own,
            steps=program.runs,
        )


def _fitting_mesh(
    planned: _PlannedMesh, devices: Sequence[Any], each: int, total: float
) -> FittingMesh:
    """The smallest axis "fsdp" on which the programs fit, compiled; its size is None for none.

    Sizes are passed over where the weights alone leave less room than the others took before.
    """
    options, model, topology = planned.options, planned.model, planned.topology
    chips, others = topology.num_chips, total - sum(planned.weights.values())
    before, least, tried = planned.mesh.shape[FSDP], total, 0
    for size in range(before + 1, chips + 1):
        if chips % size or tried == MESH_TRIES:
            continue
        found = _PlannedMesh(options, model, topology, sampling_mesh({FSDP: size}, devices))
        if sum(found.weights.values()) + max(others, 0) > topology.chip.hbm and size < chips:
            continue
        tried, least = tried + 1, found.total(each)
        if least <= topology.chip.hbm:
            return FittingMesh(size, least)
    return FittingMesh(None, least)
