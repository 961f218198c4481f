"""Tables of the names of a network's tensors in its original code and in diffusers. No jax here.

A rule has the name of an original tensor, and the names in diffusers of its parts, which are blocks
of its rows from the first down. Most tensors have one part. In names

- `*` is a number, the same on both sides; where only the diffusers' side has it, all its numbered
  blocks have a copy of the one original tensor,
- `$` is the number of the last block,
- a dot at the end stands for what follows, `weight` or `bias`.

The first rule that fits counts. The same table is read in both directions.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jaxdiff.checkpoints.safetensors import LazyTensor, TensorInfo
from jaxdiff.core.errors import InputError


@dataclass(frozen=True)
class Rule:
    """An original tensor and its parts in diffusers; without parts it is not read."""

    original: str
    parts: tuple[str, ...]
    heights: tuple[int, ...] = ()  # of the rows, for parts of unequal height; (): equal
    swapped: bool = False  # the two halves of the rows stand in the other order
    head_width: int | None = None  # of parts that alternate, as many rows of each for each head


def same(original: str, name: str) -> Rule:
    """A tensor that is the same in both."""
    return Rule(original, (name,))


def rows(original: str, *names: str, heights: Sequence[int] = ()) -> Rule:
    """A tensor of whose rows diffusers makes several; `heights` are their relative numbers."""
    return Rule(original, names, tuple(heights))


def heads(original: str, *names: str, width: int) -> Rule:
    """A tensor whose rows are those of the first head of each part, then of the second, ..."""
    return Rule(original, names, head_width=width)


def swapped(original: str, name: str) -> Rule:
    """A tensor whose halves of the rows, such as shift and scale, diffusers has the other way."""
    return Rule(original, (name,), swapped=True)


def unread(original: str) -> Rule:
    """A tensor that can be computed, and is not read."""
    return Rule(original, ())


class Parts(NamedTuple):
    """The parts of an original tensor, by name in diffusers, from the first rows down."""

    names: tuple[str, ...]
    swapped: bool  # the two halves of the rows stand in the other order


@dataclass(frozen=True)
class KeyTable:
    """The rules of a network, and how the names of its blocks begin in both namings."""

    rules: tuple[Rule, ...]
    original_blocks: str  # such as "joint_blocks."
    blocks: str  # such as "transformer_blocks."

    def parts(
        self, names: Iterable[str], depth: int | None = None
    ) -> dict[str, tuple[Rule, dict[int, str]]]:
        """The original tensors, by name, of `names` in diffusers: their rules and numbered parts.

        `depth` is the number of blocks; None: as many as there are names of. A name of no rule is
        left out.
        """
        names = list(names)
        depth = _count(names, self.blocks) if depth is None else depth
        matcher = _RuleMatcher(self.rules, depth, original=False)
        found: dict[str, tuple[Rule, dict[int, str]]] = {}
        for name in names:
            if matched := matcher.find(name):
                original = matched.name_in(matched.rule.original)
                found.setdefault(original, (matched.rule, {}))[1][matched.part] = name
        return found

    def originals(self, names: Iterable[str]) -> dict[str, Parts]:
        """The original tensors, by name, whose parts are all among `names` in diffusers."""
        return {
            original: Parts(tuple(parts[i] for i in sorted(parts)), rule.swapped)
            for original, (rule, parts) in self.parts(names).items()
            if len(parts) == len(rule.parts)
        }

    def from_original(
        self, entries: Mapping[str, TensorInfo], depth: int | None = None
    ) -> dict[str, TensorInfo]:
        """The tensors of a file under the names of diffusers; names of no rule stay as they are.

        `depth` is the number of blocks; None: as many as there are tensors of. Raises InputError
        for rows that do not divide, and for two tensors of one name.
        """
        depth = _count(entries, self.original_blocks) if depth is None else depth
        matcher = _RuleMatcher(self.rules, depth, original=True)
        found: dict[str, TensorInfo] = {}
        for name, entry in entries.items():
            matched = matcher.find(name)
            parts = {name: entry} if matched is None else _parts(matched, entry, depth)
            for new, part in parts.items():
                if new in found:
                    raise InputError(
                        f"{entry.path}: got {name} and {found[new].name}, expected one"
                    )
                found[new] = part
        return found

    def to_original(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Tensors under the names of diffusers as the original code has them.

        Raises InputError for a name of no rule, and for parts that are not all there.
        """
        matcher = _RuleMatcher(self.rules, _count(tensors, self.blocks), original=False)
        groups: dict[str, tuple[Rule, dict[int, list[LazyTensor]]]] = {}
        for name, tensor in tensors.items():
            matched = matcher.find(name)
            if matched is None:
                raise InputError(f"{name}: got it, expected a tensor that the original layout has")
            original = matched.name_in(matched.rule.original)
            _, parts = groups.setdefault(original, (matched.rule, {}))
            parts.setdefault(matched.part, []).append(tensor)
        return {name: _joined(name, rule, parts) for name, (rule, parts) in groups.items()}


@dataclass(frozen=True)
class _RuleMatch:
    """Where a name stands in a table: its rule and part, its number, and what follows."""

    rule: Rule
    part: int
    number: str
    leaf: str

    def name_in(self, template: str, number: str | None = None) -> str:
        """The name that a template of the same rule stands for."""
        return template.replace("*", number or self.number) + self.leaf


class _RuleMatcher:
    """Finds the rule of a name, on one side of a table."""

    def __init__(self, rules: Iterable[Rule], depth: int, *, original: bool):
        last = str(max(depth - 1, 0))
        self._forms: list[tuple[Rule, int, re.Pattern[str]]] = []
        for rule in rules:
            numbered = replace(
                rule,
                original=rule.original.replace("$", last),
                parts=tuple(part.replace("$", last) for part in rule.parts),
            )
            side = (numbered.original,) if original else numbered.parts
            self._forms += [(numbered, part, _form(each)) for part, each in enumerate(side)]

    def find(self, name: str) -> _RuleMatch | None:
        """The rule of a name and what it matches; None if there is none."""
        for rule, part, form in self._forms:
            if match := form.fullmatch(name):
                named = match.groupdict()
                return _RuleMatch(rule, part, named.get("number", ""), named.get("leaf", ""))
        return None


def _form(template: str) -> re.Pattern[str]:
    form = re.escape(template).replace(r"\*", r"(?P<number>\d+)")
    return re.compile(form + ("(?P<leaf>weight|bias)" if template.endswith(".") else ""))


def _count(names: Iterable[str], prefix: str) -> int:
    """How many numbered blocks there are: the highest number plus one."""
    form = re.compile(re.escape(prefix) + r"(\d+)\.")
    return max((int(m[1]) for name in names if (m := form.match(name))), default=-1) + 1


def _parts(matched: _RuleMatch, entry: TensorInfo, depth: int) -> dict[str, TensorInfo]:
    """The parts of an original tensor, by their names in diffusers."""
    rule = matched.rule
    everywhere = "*" not in rule.original and any("*" in part for part in rule.parts)
    numbers = [str(i) for i in range(depth)] if everywhere else [matched.number]
    heights = rule.heights or (1,) * len(rule.parts)
    if rule.head_width is not None:
        pieces = split_heads(entry, len(rule.parts), rule.head_width)
    else:
        pieces = [entry] if len(rule.parts) == 1 else _split(entry, heights)
    if rule.swapped:
        _check_rows(entry, 2)
        pieces = [entry.with_swapped_halves()]
    return {
        matched.name_in(part, number): piece
        for part, piece in zip(rule.parts, pieces, strict=True)
        for number in numbers
    }


def _split(entry: TensorInfo, heights: Sequence[int]) -> list[TensorInfo]:
    """Blocks of rows with these heights; none of a tensor without parts."""
    if not heights:
        return []
    _check_rows(entry, sum(heights))
    unit = entry.shape[0] // sum(heights)
    ends = [0, *itertools.accumulate(height * unit for height in heights)]
    return [entry.rows(begin, end) for begin, end in itertools.pairwise(ends)]


def split_heads(entry: TensorInfo, parts: int, width: int) -> list[TensorInfo]:
    """Parts whose rows alternate, `width` of each for each head; InputError for other numbers."""
    _check_rows(entry, parts * width)
    groups = entry.shape[0] // (parts * width)
    return [entry.every(number, parts, groups=groups) for number in range(parts)]


def join_heads(parts: Sequence[LazyTensor], width: int) -> LazyTensor:
    """The inverse of `split_heads`."""
    first = parts[0]

    def fetch() -> np.ndarray:
        values = [each.fetch().astype(first.dtype) for each in parts]
        stacked = np.stack([each.reshape(-1, width, *each.shape[1:]) for each in values], axis=1)
        return stacked.reshape(-1, *first.shape[1:])

    return replace(first, shape=(len(parts) * first.shape[0], *first.shape[1:]), fetch=fetch)


def _check_rows(entry: TensorInfo, parts: int) -> None:
    """InputError for a tensor whose rows are not as many equal parts, one after the other."""
    if not entry.shape or entry.shape[0] % parts or entry.axes is not None:
        how = ", stored by columns" if entry.axes is not None else ""
        raise InputError(
            f"{entry.path}: got {entry.name} {entry.shape}{how}, expected {parts} equal parts"
        )


def _joined(name: str, rule: Rule, parts: Mapping[int, Sequence[LazyTensor]]) -> LazyTensor:
    """The original tensor of its parts, each of which may have copies."""
    if len(parts) != len(rule.parts):
        missing = [part for i, part in enumerate(rule.parts) if i not in parts]
        raise InputError(f"{name}: got no {', '.join(missing)}, expected all its parts")
    tensors = [_only(name, parts[i]) for i in range(len(rule.parts))]
    first = tensors[0]
    if len(tensors) == 1 and not rule.swapped:
        return first
    if rule.head_width is not None:
        return join_heads(tensors, rule.head_width)

    def fetch() -> np.ndarray:
        values = np.concatenate([each.fetch().astype(first.dtype) for each in tensors])
        return np.roll(values, len(values) // 2, axis=0) if rule.swapped else values

    height = sum(each.shape[0] for each in tensors)
    return replace(first, shape=(height, *first.shape[1:]), fetch=fetch)


def _only(name: str, copies: Sequence[LazyTensor]) -> LazyTensor:
    """The tensor of which all blocks have copies; fetching raises InputError if they differ."""
    if len(copies) == 1:
        return copies[0]

    def fetch() -> np.ndarray:
        first, *others = (each.fetch() for each in copies)
        if not all(np.array_equal(first, each) for each in others):
            raise InputError(
                f"{name}: got different values in {len(copies)} blocks, expected the same in all, "
                "as the original layout has one for all of them"
            )
        return first

    return replace(copies[0], fetch=fetch)
