"""How much code one reads to follow a call: the files whose functions it enters.

The networks (models/, nn/) and core/ are left out, and empty lines are not counted. The bounds may
only fall.
"""

import pathlib
import sys
import threading

import jax
import pytest
import tiny

import jaxdiff

PACKAGE = pathlib.Path(jaxdiff.__file__).parent
LEFT_OUT = {"models", "nn", "core"}


def files_entered(call):
    """The package's files whose functions `call` enters, with their numbers of lines."""
    entered = set()

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_name != "<module>":
            entered.add(frame.f_code.co_filename)

    before = sys.getprofile()
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    paths = [pathlib.Path(name) for name in entered if name.startswith(str(PACKAGE))]
    return {
        str(path.relative_to(PACKAGE)): sum(
            bool(line.strip()) for line in path.read_text().splitlines()
        )
        for path in sorted(paths)
        if path.relative_to(PACKAGE).parts[0] not in LEFT_OUT
    }


@pytest.mark.parametrize(("max_files", "max_lines"), [(19, 3250)])
def test_from_prompt_to_pixels(tmp_path, max_files, max_lines):
    pipe = jaxdiff.load(tiny.write_tiny(tmp_path / "tiny"))
    jax.clear_caches()
    read = files_entered(lambda: pipe("a red star", steps=2))
    assert "samplers/base.py" in read
    assert len(read) <= max_files, read
    assert sum(read.values()) <= max_lines, read
