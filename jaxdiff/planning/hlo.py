"""Parse the optimised HLO of a program: collectives, and for TPUs cycles and kernels.

The TPU compiler writes an estimate of its cycles beside every operation of the optimised program.
A loop's body counts as often as the loop runs: as the compiler reports, or up to the constant that
its condition compares with, and once where neither is there. Collectives have none: they run beside
other work, and their parts (start, what is done meanwhile, done) share one number of a channel.
Kernels written by hand (Pallas) have none either.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8, "s16": 2, "u16": 2}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_KIND = re.compile(r"(?:^|[\s})])([a-z][a-z\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"^[su]32\[\][^ ]* constant\((\d+)\)")
_CALLED = re.compile(r"(?:body|calls|to_apply|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_KERNEL = 'custom_call_target="tpu_custom_call"'

Shape = tuple[int, ...]


class Operation(NamedTuple):
    """A line of the program: `text` is what follows its name."""

    name: str
    kind: str
    text: str


class Collective(NamedTuple):
    """Bytes that one chip sends, and how often it does."""

    kind: str
    bytes_sent: float
    count: int


class Kernel(NamedTuple):
    """A kernel that was written by hand, by its name and the shapes of its results."""

    name: str
    results: tuple[Shape, ...]
    operation: str  # the name of its line
    count: int


class Program(NamedTuple):
    """What `read` finds."""

    cycles: float
    collectives: list[Collective]
    kernels: list[Kernel]
    unknown_loops: int  # whose length is not written, counted once

    def bytes_sent(self) -> dict[str, float]:
        """Bytes that a chip sends, by kind of collective."""
        total: Counter[str] = Counter()
        for collective in self.collectives:
            total[collective.kind] += collective.bytes_sent * collective.count  # pyright: ignore[reportArgumentType]
        return dict(total)


def read(text: str) -> Program:
    """The cycles, collectives and kernels of the optimised HLO in `text`."""
    entry, computations = _computations(text)
    cycles, unknown = 0.0, 0
    collectives: dict[str, Collective] = {}
    kernels = []
    for operation, count, is_known in _walk(entry, computations):
        if found := _CYCLES.search(operation.text):
            cycles += count * int(found.group(1))
        unknown += not is_known
        kind = operation.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = _CHANNEL.search(operation.text)
            name = channel.group(1) if channel else operation.name
            collectives.setdefault(name, _collective(kind, operation.text, count))
        if operation.kind == "custom-call" and _KERNEL in operation.text:
            results = _shapes(operation.text.split(" custom-call(")[0])
            name = re.sub(r"(\.\d+)+$", "", operation.name)
            kernels.append(Kernel(name, results, operation.name, count))
    return Program(cycles, list(collectives.values()), kernels, unknown)


def _computations(text: str) -> tuple[str, dict[str, list[Operation]]]:
    entry, current = "", ""
    found: dict[str, list[Operation]] = {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = head.group(2)
            found[current] = []
            entry = current if head.group(1) else entry
        elif current and (parts := _OPERATION.match(line)):
            name, remainder = parts.groups()
            kind = _KIND.search(remainder)
            found[current].append(Operation(name, kind.group(1) if kind else "", remainder))
    return entry, found


def _walk(
    name: str, computations: Mapping[str, list[Operation]], count: int = 1
) -> Iterator[tuple[Operation, int, bool]]:
    """Every operation that `name` runs, how often, and whether that is known.

    An operation that carries its own estimate covers what it calls, but for collectives inside.
    """
    for operation in computations.get(name, []):
        inner = _CALLED.search(operation.text)
        iterations = _iterations(operation, computations)
        yield operation, count, iterations is not None
        if inner is None:
            continue
        has_estimate = _CYCLES.search(operation.text) is not None or operation.kind == "fusion"
        for computation in inner.group(1).replace("%", "").split(", "):
            for nested, inner_count, is_known in _walk(
                computation, computations, count * (iterations or 1)
            ):
                if not has_estimate or nested.kind.removesuffix("-start") in COLLECTIVES:
                    yield nested, inner_count, is_known


def _iterations(operation: Operation, computations: Mapping[str, list[Operation]]) -> int | None:
    """How often an operation runs what it calls, None where the text does not say."""
    if operation.kind != "while":
        return 1
    if found := _TRIPS.search(operation.text):
        return int(found.group(1))
    condition = _CONDITION.search(operation.text)
    inside = computations.get(condition.group(1), []) if condition else []
    constants = [int(c.group(1)) for o in inside if (c := _CONSTANT.match(o.text))]
    return constants[0] if len(constants) == 1 else None


def _collective(kind: str, text: str, count: int) -> Collective:
    """Bytes sent by a chip, as rings of n chips do: (n - 1)/n of what is gathered or scattered."""
    result, _, remainder = text.partition(f" {kind}")
    group_size = _group(text)
    exchanged_fraction = (group_size - 1) / group_size if group_size else 1.0
    is_start = remainder.startswith("-start") and kind != "all-reduce"
    arrays = _results(result) if is_start else _ARRAY.findall(result)
    size = sum(_bytes(*array) for array in arrays)
    bytes_sent = {
        "all-gather": size * exchanged_fraction,
        "all-reduce": 2 * size * exchanged_fraction,
        "reduce-scatter": size * max(group_size - 1, 1),
        "all-to-all": size * exchanged_fraction,
        "collective-permute": size,
    }
    return Collective(kind, bytes_sent[kind], count)


def _results(start: str) -> list[tuple[str, str]]:
    """What comes out of a start, which gives (operand, result, ...) or (operands, results, ...)."""
    bare = re.sub(r"\{[^{}]*\}", "", start)  # layouts have brackets of their own
    groups = re.findall(r"\(([^()]*)\)", bare)
    return _ARRAY.findall(groups[1]) if len(groups) > 1 else _ARRAY.findall(bare)[1:2]


def _group(text: str) -> int:
    """How many chips take part in a collective; 0 if it is not given."""
    if found := _MESH.search(text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found.group(1)))
        axes = re.findall(r"'([^']+)'", found.group(2))
        return math.prod(int(sizes[axis]) for axis in axes)
    if found := _IOTA.search(text):
        return int(found.group(2))
    if found := _LISTED.search(text):
        return len(found.group(1).split(","))
    return 0


def _bytes(dtype: str, sides: str) -> float:
    return WIDTHS.get(dtype, 1 if dtype.startswith(("s8", "u8", "f8")) else 4) * float(
        math.prod(int(side) for side in sides.split(",") if side)
    )


def _shapes(text: str) -> tuple[Shape, ...]:
    """The shapes of the arrays that are spelled in `text`."""
    return tuple(
        tuple(int(side) for side in sides.split(",") if side) for _, sides in _ARRAY.findall(text)
    )
