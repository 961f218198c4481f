"""Errors of orbax as one sentence, raised once."""

import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from jaxdiff.core.errors import WriteError


@contextlib.contextmanager
def translate_orbax_errors(name: str) -> Iterator[None]:
    """Turn what a writer of `name` raises where a disk fails into a WriteError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # ValueError is tensorstore's
        raise WriteError(
            f"{name}: got {root_cause(error)}, expected a disk that can be written"
        ) from None


def root_cause(error: Exception) -> str:
    """The first line of what went wrong, short; what the operating system said if it did."""
    text = str(error)
    if "No space left on device" in text:
        return "no space left on device"
    return (text.splitlines() or [type(error).__name__])[0][:160]


def silence_repetitions() -> None:
    """From now on an error of orbax is raised, once, and not logged ten times with tracebacks.

    Where one array cannot be read or written, those that work on others are left alone: they find
    out at any moment until the process ends, and nobody can catch what they raise then.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    global _previous_hook
    if sys.unraisablehook is not _unraisable_hook:
        _previous_hook, sys.unraisablehook = sys.unraisablehook, _unraisable_hook


_previous_hook = sys.unraisablehook


def _unraisable_hook(error: Any) -> None:
    left_alone = inspect.iscoroutine(error.object) or str(error.exc_value) == "Event loop is closed"
    if not left_alone:
        _previous_hook(error)
