"""A storage that gives no answer is waited for, and no item is lost for it."""

import warnings

import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.data.bad_samples import BadSampleError
from jaxdiff.data.sources import storage
from jaxdiff.data.sources.storage import RETRY_SECONDS, TRIES, Storage


class Clock:
    """Time that passes only while somebody waits, perhaps until a moment when all shall end."""

    def __init__(self):
        self.now, self.end = 0.0, float("inf")

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        self.now = max(self.now, min(self.now + seconds, self.end))

    def is_set(self):
        return self.now >= self.end


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(storage, "time", clock)
    monkeypatch.setattr(storage, "SHUTDOWN_REQUESTED", clock)
    return clock


@pytest.fixture
def files(tmp_path, clock, monkeypatch):
    """A storage of two files; what `fails` says of a name and the time cannot be read."""
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    found = Storage(str(tmp_path))
    read = found.fs.cat_file

    def cat_file(path, **part):
        if found.fails(path.rpartition("/")[2], clock.now):
            raise ConnectionError("refused\nand more")
        return read(path, **part)

    monkeypatch.setattr(found.fs, "cat_file", cat_file)
    monkeypatch.setattr(found.fs, "isdir", lambda path: not found.fails("", clock.now))
    return found


@pytest.mark.parametrize("first", [True, False])
def test_it_is_waited_for(files, clock, first):
    files.fails = lambda name, now: False
    if not first:
        assert files.read("a") == b"a"
    initial = clock.now
    files.fails = lambda name, now: now < initial + 300
    message = r"^data.path: got no answer from .* \(refused\), retrying$"
    with pytest.warns(UserWarning, match=message) as told:
        assert files.read("b") == b"b"
    assert 300 <= clock.now - initial < 330
    assert len(told) == 1


def test_but_not_for_ever(files, clock):
    files.fails = lambda name, now: True
    message = r"^data.path: got no answer from .* \(refused\) for 6\d\d s, expected its files$"
    with pytest.warns(UserWarning, match="retrying"), pytest.raises(InputError, match=message):
        files.read("b")
    assert RETRY_SECONDS < clock.now < RETRY_SECONDS + 60


def test_and_not_once_the_process_shall_end(files, clock):
    files.fails = lambda name, now: True
    clock.end = 20.0
    message = r"got no answer from .* \(refused\) for 20 s, expected its files$"
    with pytest.warns(UserWarning, match="retrying"), pytest.raises(InputError, match=message):
        files.read("b")


@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_alone_cannot_be_read_is_broken(files, clock, first):
    files.fails = lambda name, now: name == "b"
    if not first:
        assert files.read("a") == b"a"
    with pytest.raises(BadSampleError, match="unreadable file"):
        files.read("b")
    assert clock.now == pytest.approx(sum(0.5 * 2**k for k in range(TRIES - 1)))


def test_a_file_that_fails_once_is_read(files, clock):
    files.fails = lambda name, now: now < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert files.read("b") == b"b"
    assert clock.now == 0.5


def test_a_missing_file_is_not_waited_for(files, clock):
    files.fails = lambda name, now: False
    with pytest.raises(BadSampleError, match="missing file"):
        files.read("c")
    assert clock.now == 0
