"""A file is there whole or not at all, and what cannot be written is one sentence."""

import errno

import pytest

from jaxdiff.core.atomic import atomic_file, remove_leftovers
from jaxdiff.core.errors import WriteError, os_error_message


def test_a_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "a" / "b.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
    assert target.read_text() == "half"
    with pytest.raises(KeyError), atomic_file(target) as temporary:  # noqa: PT012
        temporary.write_text("another")
        raise KeyError
    assert target.read_text() == "half"
    assert [path.name for path in target.parent.iterdir()] == ["b.txt"]


def test_two_may_write_one_file(tmp_path):
    target = tmp_path / "b.txt"
    with atomic_file(target) as first:
        first.write_text("first")
        with atomic_file(target) as second:
            second.write_text("second")
        assert target.read_text() == "second"
    assert target.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a"), "no space left on device"),
        (OSError("encoder error -2"), "encoder error -2"),
        (ConnectionError(), "connectionerror"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), "no such file"),
    ],
)
def test_what_the_system_or_a_library_says_is_passed_on(error, said):
    assert os_error_message(error) == said


def test_a_folder_that_is_a_file_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "b.txt"
    message = f"^{target}: got .*, expected a file to write$"
    with pytest.raises(WriteError, match=message), atomic_file(target):
        pass


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".a.png.0123.part", ".a.png", ".b.png.0123.part", "a.png.part", "a.png"):
        (tmp_path / name).touch()
    remove_leftovers([tmp_path / "a.png", tmp_path / "missing" / "a.png"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".a.png", ".b.png.0123.part", "a.png.part", "a.png"}
