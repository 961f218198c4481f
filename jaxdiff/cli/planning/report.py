"""A plan: what the compiler says of a program on a topology, as numbers, a table and JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdiff.cli.planning.chips import GIB
from jaxdiff.cli.planning.compiling import Compiled
from jaxdiff.cli.planning.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One program on one topology; all bytes, FLOPs and cycles are those of one chip and step."""

    topology: Topology
    batch_size: int  # pictures of all chips together
    compiled: Compiled
    model_flops: float  # see `flops`
    held: Mapping[str, float]  # bytes that a chip holds between steps
    steps: int = 1  # that make the result: of the sampling loop for a picture
    largest: int | None = None  # batch that fits

    @property
    def fits(self) -> bool:
        """Whether the program has room in the chip's memory."""
        return self.compiled.cycles is not None

    @property
    def compute_s(self) -> float:
        """Seconds of the estimated cycles, those of kernels included."""
        return (
            (self.compiled.cycles or 0.0) + self.compiled.kernel_cycles
        ) / self.topology.chip.clock

    @property
    def links_s(self) -> float:
        """Seconds that the links need at their full speed for what a chip sends."""
        return sum(self.compiled.sent.values()) / self.topology.chip.link

    @property
    def step_s(self) -> float:
        """Seconds of a step whose collectives all run beside its computation."""
        return max(self.compute_s, self.links_s)

    @property
    def utilisation(self) -> float:
        """Model FLOPs over what the chip could do in that time at its bfloat16 peak."""
        return self.model_flops / (self.step_s * self.topology.chip.peak) if self.step_s else 0.0

    @property
    def utilisation_apart(self) -> float:
        """The same if no collective ran beside computation."""
        seconds = self.compute_s + self.links_s
        return self.model_flops / (seconds * self.topology.chip.peak) if seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        compiled, chip = self.compiled, self.topology.chip
        values: dict[str, Any] = {
            "topology": self.topology.title,
            "chips": self.topology.chips,
            "batch_size": self.batch_size,
            "fits": self.fits,
            "hbm_bytes": chip.hbm,
            "total_bytes": compiled.total,
            "held_bytes": dict(self.held),
            "model_flops": self.model_flops,
            "largest_batch_size": self.largest,
            "compile_s": compiled.compile_s,
            "compiler": compiled.compiler,
        }
        if not self.fits:
            return values
        return values | {
            "argument_bytes": compiled.arguments,
            "temporary_bytes": compiled.temporaries,
            "code_bytes": compiled.code,
            "compiler_flops": compiled.flops,
            "cycles": compiled.cycles,
            "kernel_cycles": compiled.kernel_cycles,
            "not_estimated": list(compiled.unknown),
            "loops_counted_once": compiled.loops,
            "sent_bytes": dict(compiled.sent),
            "collectives": dict(compiled.times),
            "compute_s": self.compute_s,
            "links_s": self.links_s,
            "step_s": self.step_s,
            "steps": self.steps,
            "images_per_s": self.batch_size / (self.steps * self.step_s),
            "utilisation": self.utilisation,
            "utilisation_apart": self.utilisation_apart,
        }


def table(plan: Plan) -> str:
    """A plan in lines for a terminal."""
    compiled, chip = plan.compiled, plan.topology.chip
    each = plan.batch_size / plan.topology.chips
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        f"{plan.topology.title}  {plan.topology.chips} chips, "
        f"batch {plan.batch_size} ({each:g} a chip)",
        f"  memory       {_gib(compiled.total)} of {_gib(chip.hbm)} a chip: {verdict}",
        "    held       " + ", ".join(f"{name} {_gib(size)}" for name, size in plan.held.items()),
    ]
    if plan.fits:
        lines += [
            f"    arguments {_gib(compiled.arguments)}, temporaries {_gib(compiled.temporaries)}, "
            f"code {_gib(compiled.code)}",
            f"  FLOPs        {plan.model_flops:.3e} of the model, "
            f"{compiled.flops:.3e} by the compiler without kernels",
            f"  cycles       {compiled.cycles / 1e6:.1f} M estimated"  # pyright: ignore[reportOptionalOperand]
            f" + {compiled.kernel_cycles / 1e6:.1f} M scheduled for kernels: "
            f"{1e3 * plan.compute_s:.1f} ms at {chip.clock / 1e9:g} GHz",
            "  collectives  "
            + (_collectives(compiled) or "none")
            + f": {1e3 * plan.links_s:.1f} ms on the links",
            f"  step         {1e3 * plan.step_s:.1f} ms if all overlap, "
            f"{plan.batch_size / (plan.steps * plan.step_s):.1f} images/s",
            f"  utilisation  {plan.utilisation:.1%} of the bfloat16 peak "
            f"({plan.utilisation_apart:.1%} if nothing overlaps)",
        ]
    if compiled.loops:
        lines.append(f"  counted once {compiled.loops} loops of unknown length")
    if compiled.unknown:
        lines.append(f"  not counted  {', '.join(compiled.unknown)}")
    if plan.largest is not None:
        lines.append(
            f"  largest      batch {plan.largest} ({plan.largest / plan.topology.chips:g} a chip)"
        )
    lines.append(f"  compiled     by libtpu {compiled.compiler} in {compiled.compile_s:.0f} s")
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _collectives(compiled: Compiled) -> str:
    return ", ".join(
        f"{compiled.times[kind]} {kind} {size / GIB:.3f} GiB"
        for kind, size in sorted(compiled.sent.items())
    )
