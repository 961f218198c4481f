import dataclasses

import pytest

from jaxdiff.core.configs import from_mapping, to_mapping
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
