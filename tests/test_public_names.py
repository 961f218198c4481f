"""`jaxdiff` shows what it exports, and exports what it shows."""

import pathlib
import subprocess
import sys

import pytest

import jaxdiff


def test_all_names_are_there():
    assert set(jaxdiff.__all__) <= set(dir(jaxdiff))
    for name in jaxdiff.__all__:
        assert getattr(jaxdiff, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = jaxdiff.lod


@pytest.mark.parametrize("module", jaxdiff._MODULES)
def test_libraries_say_what_they_export(module):
    library = getattr(jaxdiff, module)
    assert dir(library) == sorted(library.__all__)
    for name in library.__all__:
        assert getattr(library, name) is not None


def test_the_package_alone_imports_no_jax():
    code = "import sys, jaxdiff; dir(jaxdiff); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_is_typed():
    assert (pathlib.Path(jaxdiff.__file__).parent / "py.typed").exists()
