import dataclasses
import json
import re

import pytest

from jaxdiff.core.configs import from_mapping, from_mapping_recursive, prefix_errors, to_mapping
from jaxdiff.core.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    width: int
    blocks: tuple[int, ...] = (1, 2)


def test_round_trip():
    sizes = Sizes(width=3, blocks=(4, 5, 6))
    assert from_mapping(Sizes, to_mapping(sizes), source="config.json") == sizes


def test_lists_become_tuples_and_private_keys_are_skipped():
    got = from_mapping(Sizes, {"_class_name": "X", "width": 1, "blocks": [7]}, source="c.json")
    assert got == Sizes(width=1, blocks=(7,))


def test_unknown_field_names_the_source_and_the_nearest():
    with pytest.raises(InputError, match=r"c\.json: field: got 'widht', .*'width'"):
        from_mapping(Sizes, {"widht": 1}, source="c.json")


def test_missing_field():
    with pytest.raises(InputError, match=r"c\.json: got no field 'width'"):
        from_mapping(Sizes, {}, source="c.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kinds:
    """A field of every kind that configs have."""

    count: int = 1
    share: float = 1.0
    flag: bool = False
    word: str | None = None
    sizes: int | tuple[int, ...] = 1
    depths: tuple[int | tuple[int, ...], ...] = ()


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"count": True}, "count: got True, expected an integer"),
        ({"count": 1.5}, "count: got 1.5, expected an integer"),
        ({"count": None}, "count: got None, expected an integer"),
        ({"share": "1"}, "share: got '1', expected a number"),
        ({"share": False}, "share: got False, expected a number"),
        ({"flag": 1}, "flag: got 1, expected true or false"),
        ({"word": 3}, "word: got 3, expected a string"),
        ({"sizes": [1, "2"]}, "sizes: got [1, '2'], expected an integer or a list, each an int"),
        ({"sizes": {"a": 1}}, "sizes: got {'a': 1}, expected an integer or a list"),
        ({"depths": [[[1]]]}, "depths: got [[[1]]], expected a list, each an integer or a list"),
    ],
)
def test_values_of_another_type(mapping, expected):
    with pytest.raises(InputError, match=re.escape(f"c.json: {expected}")):
        from_mapping(Kinds, mapping, source="c.json")


def test_values_of_the_right_type():
    values = {"share": 2, "flag": True, "word": None, "sizes": [1, 2], "depths": [1, [2, 3]]}
    got = from_mapping(Kinds, values, source="c.json")
    assert got == Kinds(share=2, flag=True, sizes=(1, 2), depths=(1, (2, 3)))


@pytest.mark.parametrize("text", ["steps: got 0", "a.json: steps: got 0"])
def test_an_error_names_its_source_once(text):
    with pytest.raises(InputError, match=r"^a\.json: steps: got 0$"), prefix_errors("a.json"):
        raise InputError(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Left:
    length: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Right:
    width: float = 2.0
    sides: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    branch: Left | Right
    other: Right | None = None


@pytest.mark.parametrize(
    "tree",
    [
        Tree(branch=Left(length=3)),
        Tree(branch=Right(width=1.0, sides=(1, 2)), other=Right(sides=(4,))),
    ],
)
def test_nested_configs_come_back_from_json(tree):
    stored = json.loads(json.dumps(to_mapping(tree)))
    assert from_mapping_recursive(Tree, stored, source="tree.json") == tree


def test_fields_of_no_choice_are_refused():
    with pytest.raises(InputError, match=r"tree\.json: got the fields height, expected"):
        from_mapping_recursive(Tree, {"branch": {"height": 1}}, source="tree.json")


def test_a_field_that_is_missing_is_named():
    with pytest.raises(InputError, match=r"^tree\.json: got no field 'branch', expected one$"):
        from_mapping_recursive(Tree, {}, source="tree.json")
