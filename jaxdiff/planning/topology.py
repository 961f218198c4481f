"""Topologies such as v5p:4x4x4 or h200:8, and their abstract devices."""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.experimental import topologies

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.parallel.chips import CHIPS, GPU, TPU, Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Chips of one kind in a grid."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def title(self) -> str:
        """As it is written on the command line."""
        return f"{self.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """The topology called `text`, a chip and the sides of a grid; InputError for what is none."""
    name, _, sides = text.partition(":")
    chip = CHIPS[one_of("plan", name, CHIPS)]
    example = "x".join(["4"] * chip.dimensions)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
        raise InputError(
            f"plan: got {text}, expected a chip and its grid, such as {name}:{example}"
        )
    shape = tuple(map(int, sides.split("x")))
    if len(shape) != chip.dimensions:
        many = f"{chip.dimensions} sides" if chip.dimensions > 1 else "one number"
        raise InputError(f"plan: got {text}, expected {many} for {name}, such as {name}:{example}")
    topology = Topology(name=name, chip=chip, shape=shape)
    if isinstance(chip, GPU) and topology.num_chips > chip.max_devices:
        raise InputError(
            f"plan: got {text}, expected 1 to {chip.max_devices} GPUs, as one machine has"
        )
    return topology


def topology_devices(topology: Topology) -> list[Any]:
    """Its devices, for compiling only; InputError for a grid that such chips do not come in."""
    chip = topology.chip
    options = chip.options if isinstance(chip, TPU) else {}
    if isinstance(chip, GPU):
        options = {"topology": f"1x1x{topology.num_chips}", "target_config": chip.target_config()}
    try:
        found = topologies.get_topology_desc(topology.title, platform=chip.platform, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"plan: got {topology.title}, expected another grid: {reason}") from None
    return list(found.devices)
