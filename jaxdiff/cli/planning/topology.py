"""TPU topologies such as v5p:4x4x4, and devices of one to compile for where there is none."""

import dataclasses
import importlib.util
import math
import os
import re
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from jaxdiff.cli.planning.chips import CHIPS, Chip
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of

PACKAGES = ("libtpu", "flatbuffers")  # the TPU compiler; kernels on their way to its other process
INSTALL = 'pip install "jax[tpu]" flatbuffers'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Chips of one kind in a grid."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def title(self) -> str:
        """As it is written on the command line."""
        return f"{self.name}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Topology:
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
        raise InputError(
            f"plan: got {text}, expected {chip.dimensions} sides for {name}, such as "
            f"{name}:{example}"
        )
    return Topology(name=name, chip=chip, shape=shape)


def prepare(topology: Topology, *, schedules: str | None = None) -> None:
    """Tell the TPU compiler what it would ask the machine; call it before any device is used.

    It writes how it schedules operations to the folder `schedules`, if there is one. InputError
    where there is no compiler, or one that is not of the version that JAX is made for.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"plan: got no package {name}, expected all of {INSTALL}")
    _check_compiler()
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # as many plans at a time as memory allows
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_ACCELERATOR_TYPE"] = topology.chip.accelerator
    if schedules is None:
        return
    flags = {
        "xla_jf_dump_to": schedules,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_hlo_text": "false",
        "xla_jf_dump_llo_pass_label_regex": "final_bundles",
    }
    said = os.environ.get("LIBTPU_INIT_ARGS", "")
    more = " ".join(f"--{name}={value}" for name, value in flags.items())
    os.environ["LIBTPU_INIT_ARGS"] = f"{said} {more}".strip()  # read when the compiler is loaded


def compiler_version() -> str:
    """That of the TPU compiler, whose estimates may differ from another's."""
    return metadata.version("libtpu")


def _check_compiler() -> None:
    """InputError for a libtpu that JAX does not ask for: it may not read the programs of that."""
    found = compiler_version()
    for wanted in map(Requirement, metadata.requires("jax") or ()):
        if wanted.name == "libtpu" and not wanted.specifier.contains(found, prereleases=True):
            raise InputError(
                f"plan: got libtpu {found}, expected {wanted.specifier} as jax "
                f"{metadata.version('jax')} asks for: {INSTALL}"
            )


def devices(topology: Topology) -> list[Any]:
    """Its devices, for compiling only; InputError for a grid that such chips do not come in."""
    import jax
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            topology.title, platform="tpu", **topology.chip.options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"plan: got {topology.title}, expected another grid: {reason}") from None
    return list(found)
