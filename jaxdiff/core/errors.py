"""The exceptions whose message is all that the user needs."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input, in one sentence `name: got X, expected Y`; the command line exits with 2.

    What users or libraries have said in it is put on one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class WriteError(InputError):
    """A place that cannot be written to (any more): no permission, no space, no such folder."""


@contextlib.contextmanager
def errors_of(field: str) -> Iterator[None]:
    """Names the `field` that led to an InputError, such as one of the file that it names."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{field}: {error}") from None


def os_error_message(error: OSError) -> str:
    """What went wrong, without the path that the message names already."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    message = error.strerror or str(error) or type(error).__name__  # libraries give no number
    return message.lower()
