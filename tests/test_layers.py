"""Imports only go down the ranks of the package; folders of one rank never import each other.

Nor do the files of one folder import each other in a circle.
"""

import ast
import graphlib
import pathlib

import pytest

RANK = {
    "core": 0,
    "diffusion": 1,
    "nn": 1,
    "parallel": 1,
    "models": 2,
    "guidance": 2,
    "samplers": 2,
    "profiling": 2,
    "checkpoints": 3,
    "data": 3,
    "families": 4,
    "training": 5,
    "pipeline": 5,
    "evaluation": 6,
    "generation": 6,
    "scenes": 6,
    "experiments": 7,
    "serve": 7,
    "planning": 8,
    "cli": 9,
}
PACKAGE = pathlib.Path(__file__).parents[1] / "jaxdiff"
FILES = sorted(PACKAGE.glob("*/**/*.py"))


def imported_folders(path: pathlib.Path) -> set[str]:
    """Folders of the package that the file at `path` imports from."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    return {p[1] for p in parts if p[0] == "jaxdiff" and len(p) > 1 and p[1] in RANK}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = path.relative_to(PACKAGE).parts[0]
    upward = {f for f in imported_folders(path) if f != here and RANK[f] >= RANK[here]}
    assert not upward, f"{here} (rank {RANK[here]}) imports {upward}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_scenes_are_a_plug_in(path):
    """Only `experiments/procedural.py` imports them, by the name in PROCEDURAL_KINDS."""
    assert path.parent.name == "scenes" or "scenes" not in imported_folders(path)


def test_every_folder_has_a_rank():
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert folders <= set(RANK), folders - set(RANK)


def imported_modules(path: pathlib.Path) -> set[str]:
    """Modules of the package that the file at `path` imports when it is loaded."""
    tree = ast.parse(path.read_text())
    checked = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    names: set[str] = set()
    for node in tree.body:
        for inner in ast.walk(node) if not isinstance(node, ast.FunctionDef) else ():
            if isinstance(inner, ast.ImportFrom) and inner not in checked:
                names |= {f"{inner.module}.{alias.name}" for alias in inner.names}
                names.add(str(inner.module))
    return names


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.mark.parametrize("folder", sorted(RANK))
def test_files_of_a_folder_do_not_import_each_other_in_a_circle(folder):
    files = {module_name(p): p for p in FILES if p.relative_to(PACKAGE).parts[0] == folder}
    graph = {name: imported_modules(path) & files.keys() - {name} for name, path in files.items()}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle
