"""A plan: memory, cost and estimates of a program on a topology, as text and JSON."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxdiff.parallel.chips import GIB, TPU
from jaxdiff.planning.compiling import CompiledProgram
from jaxdiff.planning.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One program on one topology; all bytes, FLOPs and cycles are those of one chip and step."""

    topology: Topology
    batch_size: int  # images on all chips together
    compiled: CompiledProgram
    model_flops: float  # see `flops`
    state_bytes: Mapping[str, float]  # bytes per chip that persist between steps
    steps: int = 1  # per image: those of the sampling loop
    resident_bytes: float = 0.0  # of weights of other programs, which the chip holds meanwhile
    max_batch_size: int | None = None  # largest batch that fits

    @property
    def total(self) -> float:
        """Peak bytes, with the weights of other programs."""
        return self.compiled.total + self.resident_bytes

    @property
    def fits(self) -> bool:
        """Whether the chip has so much memory."""
        chip = self.topology.chip
        return self.compiled.fits and (not self.resident_bytes or self.total <= chip.hbm)

    @property
    def seconds(self) -> float | None:
        """Of all its steps; None without an estimate."""
        return None if self.step_s is None else self.steps * self.step_s

    @property
    def compute_s(self) -> float | None:
        """Seconds of the estimated cycles, those of kernels included; None without an estimate."""
        compiled, chip = self.compiled, self.topology.chip
        if compiled.cycles is None or not isinstance(chip, TPU):
            return None
        return (compiled.cycles + compiled.kernel_cycles) / chip.clock

    @property
    def links_s(self) -> float:
        """Seconds that the links need at their full speed for what a chip sends."""
        return sum(self.compiled.bytes_sent.values()) / self.topology.chip.link

    @property
    def step_s(self) -> float | None:
        """Seconds of a step if all collectives overlap with computation."""
        return None if self.compute_s is None else max(self.compute_s, self.links_s)

    @property
    def images_per_s(self) -> float | None:
        """Of all chips together."""
        return self.batch_size / self.seconds if self.seconds else None

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs over what the chip could do in that time at its bfloat16 peak."""
        return self._of_peak(self.step_s)

    @property
    def utilisation_apart(self) -> float | None:
        """The same if no collective overlapped with computation."""
        return self._of_peak(None if self.compute_s is None else self.compute_s + self.links_s)

    def _of_peak(self, seconds: float | None) -> float | None:
        return self.model_flops / (seconds * self.topology.chip.peak_flops) if seconds else None

    def to_json(self) -> dict[str, Any]:
        """JSON values; without those that are not known."""
        compiled, chip = self.compiled, self.topology.chip
        values: dict[str, Any] = {
            "topology": self.topology.title,
            "chips": self.topology.num_chips,
            "batch_size": self.batch_size,
            "fits": self.fits,
            "hbm_bytes": chip.hbm,
            "total_bytes": self.total,
            "resident_bytes": self.resident_bytes,
            "held_bytes": dict(self.state_bytes),
            "model_flops": self.model_flops,
            "largest_batch_size": self.max_batch_size,
            "compile_s": compiled.compile_s,
            "compiler": compiled.compiler,
        }
        if compiled.is_compiled:
            values |= {
                "argument_bytes": compiled.arguments,
                "temporary_bytes": compiled.temporaries,
                "code_bytes": compiled.code,
                "loops_counted_once": compiled.unknown_loops,
                "sent_bytes": dict(compiled.bytes_sent),
                "collectives": dict(compiled.collective_counts),
                "links_s": self.links_s,
                "steps": self.steps,
            }
        if compiled.cycles is not None:
            values |= {
                "compiler_flops": compiled.flops,
                "cycles": compiled.cycles,
                "kernel_cycles": compiled.kernel_cycles,
                "not_estimated": list(compiled.unknown_kernels),
                "compute_s": self.compute_s,
                "step_s": self.step_s,
                "seconds": self.seconds,
                "images_per_s": self.images_per_s,
                "utilisation": self.utilisation,
                "utilisation_apart": self.utilisation_apart,
            }
        return values


class FittingMesh(NamedTuple):
    """The mesh on which a model fits that does not fit as it was planned."""

    fsdp: int | None  # the size of that axis; None: it fits on none of those that were compiled
    total: float  # peak bytes of a chip there


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """The programs that generate a batch of images, one after the other, on one topology."""

    topology: Topology
    batch_size: int  # images on all chips together
    programs: Mapping[str, Plan]  # by name, in their order; "loop" is one of them
    weights: Mapping[str, float]  # bytes of a chip by component, also of what is offloaded
    offload: str | None = None
    max_batch_size: int | None = None  # largest batch that fits
    fitting_mesh: FittingMesh | None = None  # where the batch does not fit

    @property
    def total(self) -> float:
        """Peak bytes of the program that needs most."""
        return max(plan.total for plan in self.programs.values())

    @property
    def fits(self) -> bool:
        """Whether the chip has memory for each program."""
        return all(plan.fits for plan in self.programs.values())

    @property
    def batch_s(self) -> float | None:
        """Seconds of all programs for a batch; None without an estimate."""
        seconds = [plan.seconds for plan in self.programs.values()]
        return sum(s for s in seconds if s is not None) if None not in seconds else None

    @property
    def images_per_s(self) -> float | None:
        """Of all chips together, all programs counted."""
        return self.batch_size / self.batch_s if self.batch_s else None

    def to_json(self) -> dict[str, Any]:
        """JSON values: those of the loop, and beside them the whole and each program's own."""
        values = self.programs["loop"].to_json() | {
            "fits": self.fits,
            "total_bytes": self.total,
            "held_bytes": {"weights": sum(self.weights.values())},
            "weights_bytes": dict(self.weights),
            "offload": self.offload,
            "largest_batch_size": self.max_batch_size,
            "programs": {name: plan.to_json() for name, plan in self.programs.items()},
        }
        if self.batch_s is not None:
            values |= {"batch_s": self.batch_s, "images_per_s": self.images_per_s}
        if self.fitting_mesh is not None:
            fsdp, total = self.fitting_mesh
            values["fitting_mesh"] = {"fsdp": fsdp, "total_bytes": total}
        return values

    def to_text(self) -> str:
        """Lines for a terminal."""
        chip, number = self.topology.chip, self.topology.num_chips
        noun = chip.unit_name
        offloaded = " (text encoders offloaded)" if self.offload else ""
        lines = [
            *_header(self.topology, self.batch_size, self.total, self.fits),
            "    weights    "
            + ", ".join(f"{name} {_gib(size)}" for name, size in self.weights.items())
            + offloaded,
        ]
        if self.fitting_mesh is not None:
            lines.append(f"  mesh         {_mesh(self.fitting_mesh, self.topology)}")
        if self.batch_s is not None:
            milliseconds = f"{1e3 * self.batch_s:.1f} ms a batch"
            lines.append(f"  images       {self.images_per_s:.2f} images/s, {milliseconds}")
        if self.max_batch_size is not None:
            lines.append(_largest(self.max_batch_size, number, noun))
        for name, plan in self.programs.items():
            times = f"{plan.steps} steps" if name == "loop" else "once a batch"
            lines.append(f"  {name.replace('_', ' ')}, {times}")
            compiled, weights = _gib(plan.compiled.total), _gib(plan.resident_bytes)
            lines.append(
                f"    memory       {_gib(plan.total)} a {noun}: {compiled}, and {weights} of "
                "weights that it does not use"
            )
            lines += [f"  {line}" for line in _details(plan)]
        return "\n".join(lines)


Planner = Callable[[Topology], Plan | SamplingPlan]


def format_plan(plan: Plan | SamplingPlan) -> str:
    """A plan in lines for a terminal."""
    if isinstance(plan, SamplingPlan):
        return plan.to_text()
    lines = [
        *_header(plan.topology, plan.batch_size, plan.total, plan.fits),
        "    state      "
        + ", ".join(f"{name} {_gib(size)}" for name, size in plan.state_bytes.items()),
        *_details(plan),
    ]
    return "\n".join(lines)


def _header(topology: Topology, batch_size: int, total: float, fits: bool) -> list[str]:
    """The lines about what is planned, and whether it fits."""
    noun, number = topology.chip.unit_name, topology.num_chips
    verdict = "fits" if fits else "DOES NOT FIT"
    return [
        f"{topology.title}  {number} {noun}{'s' * (number > 1)}, "
        f"batch {batch_size} ({batch_size / number:g} a {noun})",
        f"  memory       {_gib(total)} of {_gib(topology.chip.hbm)} a {noun}: {verdict}",
    ]


def _mesh(found: FittingMesh, topology: Topology) -> str:
    noun = topology.chip.unit_name
    if found.fsdp is not None:
        return f"--mesh fsdp={found.fsdp} fits: {_gib(found.total)} a {noun}"
    if topology.num_chips == 1:
        return f"none that fits, of one {noun}"
    return f"none that fits, of {topology.num_chips}: {_gib(found.total)} a {noun} on the last one"


def _largest(batch_size: int, chips: int, noun: str) -> str:
    return f"  largest      batch {batch_size} ({batch_size / chips:g} a {noun})"


def _details(plan: Plan) -> list[str]:
    """The lines about one compiled program.

    Those about memory and time are missing for one that does not fit.
    """
    compiled, chip = plan.compiled, plan.topology.chip
    lines: list[str] = []
    if compiled.is_compiled:
        lines += _program(plan)
    if compiled.unknown_loops:
        lines.append(f"  counted once {compiled.unknown_loops} loops of unknown length")
    if compiled.unknown_kernels:
        lines.append(f"  not counted  {', '.join(compiled.unknown_kernels)}")
    if plan.max_batch_size is not None:
        lines.append(_largest(plan.max_batch_size, plan.topology.num_chips, chip.unit_name))
    lines.append(f"  compiled     by {compiled.compiler} in {compiled.compile_s:.0f} s")
    return lines


def _program(plan: Plan) -> list[str]:
    """The lines about memory, FLOPs and time of a compiled program."""
    compiled, chip = plan.compiled, plan.topology.chip
    counted = f", {compiled.flops:.3e} by the compiler without kernels" if compiled.flops else ""
    lines = [
        f"    arguments {_gib(compiled.arguments)}, temporaries {_gib(compiled.temporaries)}, "
        f"code {_gib(compiled.code)}",
        f"  FLOPs        {plan.model_flops:.3e} of the model{counted}",
        "  collectives  "
        + (_collectives(compiled) or "none")
        + f": {1e3 * plan.links_s:.1f} ms on the links",
    ]
    if isinstance(chip, TPU) and compiled.cycles is not None and plan.compute_s is not None:
        lines.insert(
            2,
            f"  cycles       {compiled.cycles / 1e6:.1f} M estimated"
            f" + {compiled.kernel_cycles / 1e6:.1f} M scheduled for kernels: "
            f"{1e3 * plan.compute_s:.1f} ms at {chip.clock / 1e9:g} GHz",
        )
    if plan.step_s is not None:
        lines += [
            f"  step         {1e3 * plan.step_s:.1f} ms if all overlap, "
            f"{plan.images_per_s:.1f} images/s",
            f"  utilisation  {plan.utilisation:.1%} of the bfloat16 peak "
            f"({plan.utilisation_apart:.1%} if nothing overlaps)",
        ]
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _collectives(compiled: CompiledProgram) -> str:
    return ", ".join(
        f"{compiled.collective_counts[kind]} {kind} {size / GIB:.3f} GiB"
        for kind, size in sorted(compiled.bytes_sent.items())
    )
