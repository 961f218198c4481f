"""A plan: memory, cost and estimates of a program on a topology, as text and JSON."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

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
    max_batch_size: int | None = None  # largest batch that fits

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
        return self.batch_size / (self.steps * self.step_s) if self.step_s else None

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
            "fits": compiled.fits,
            "hbm_bytes": chip.hbm,
            "total_bytes": compiled.total,
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
                "images_per_s": self.images_per_s,
                "utilisation": self.utilisation,
                "utilisation_apart": self.utilisation_apart,
            }
        return values


Planner = Callable[[Topology], Plan]


def format_plan(plan: Plan) -> str:
    """A plan in lines for a terminal."""
    compiled, chip = plan.compiled, plan.topology.chip
    noun, number = chip.unit_name, plan.topology.num_chips
    each = plan.batch_size / number
    verdict = "fits" if compiled.fits else "DOES NOT FIT"
    lines = [
        f"{plan.topology.title}  {number} {noun}{'s' * (number > 1)}, "
        f"batch {plan.batch_size} ({each:g} a {noun})",
        f"  memory       {_gib(compiled.total)} of {_gib(chip.hbm)} a {noun}: {verdict}",
        "    state      "
        + ", ".join(f"{name} {_gib(size)}" for name, size in plan.state_bytes.items()),
    ]
    if compiled.is_compiled:
        lines += _program(plan)
    if compiled.unknown_loops:
        lines.append(f"  counted once {compiled.unknown_loops} loops of unknown length")
    if compiled.unknown_kernels:
        lines.append(f"  not counted  {', '.join(compiled.unknown_kernels)}")
    if plan.max_batch_size is not None:
        lines.append(
            f"  largest      batch {plan.max_batch_size} "
            f"({plan.max_batch_size / number:g} a {noun})"
        )
    lines.append(f"  compiled     by {compiled.compiler} in {compiled.compile_s:.0f} s")
    return "\n".join(lines)


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
