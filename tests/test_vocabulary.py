"""Identifiers are words that others use: private ones stay out, or the glossary explains them."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Words that the first versions had for things that the field has names for.
PRIVATE = {
    "anew",
    "begun",
    "cell",
    "company",
    "dial",
    "dials",
    "dwell",
    "eye",
    "goes",
    "hear",
    "heard",
    "hears",
    "judged",
    "kept",
    "lay",
    "lens",
    "lies",
    "picture",
    "pictures",
    "rest",
    "said",
    "say",
    "says",
    "share",
    "shares",
    "still",
    "tell",
    "tells",
    "thing",
    "things",
    "told",
}
# Where such a word is the field's own: a grid of images has cells, `jnp.eye`, a file's `tell`.
ELSEWHERE = {
    ("jaxdiff/evaluation/image_grid.py", "cell"),
    ("jaxdiff/training/objectives/clip.py", "eye"),
    ("benchmarks/probes.py", "eye"),
    ("jaxdiff/checkpoints/flax_msgpack.py", "tell"),
    ("jaxdiff/data/sources/tars.py", "tell"),
    ("jaxdiff/generation/input_files.py", "tell"),
}


def identifiers(tree: ast.AST) -> set[str]:
    """The names of definitions, arguments, variables, fields and attributes."""
    names = set()
    for node in ast.walk(tree):
        for field in ("name", "arg", "id", "attr"):
            if isinstance(name := getattr(node, field, None), str):
                names.add(name)
    return names


@pytest.mark.parametrize("name", ["jaxdiff", "configs", "benchmarks"])
def test_identifiers_are_the_fields(name):
    found = set()
    for path in sorted((ROOT / name).rglob("*.py")):
        for identifier in identifiers(ast.parse(path.read_text())):
            words = {w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", identifier)}
            file = str(path.relative_to(ROOT))
            found |= {(file, word) for word in words.intersection(PRIVATE)}
    assert found - ELSEWHERE == set()
