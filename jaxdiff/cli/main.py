"""`jaxdiff COMMAND ...`: run a command; an InputError becomes one sentence on stderr."""

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jaxdiff
from jaxdiff.core.aliases import former_options, rename_options
from jaxdiff.core.errors import InputError, os_error_message
from jaxdiff.core.shutdown import SHUTDOWN_REQUESTED
from jaxdiff.core.validate import one_of

COMMANDS = {
    "generate": "generate images from prompts",
    "train": "train a model from a config file",
    "cache-latents": "encode images once, to train from their latents",
    "export": "write a trained model as a diffusers folder",
    "convert": "convert a checkpoint to another layout",
    "serve": "answer HTTP requests for images",
    "inspect": "describe a checkpoint",
    "evaluate": "measure how well a scene model follows its prompts",
    "sweep": "compare guidance rules, samplers and scales",
    "strip": "show one generation step by step",
}
USAGE = "usage: jaxdiff COMMAND ...\n       jaxdiff --version\n\n" + "\n".join(
    f"  {name:13s} {text}" for name, text in COMMANDS.items()
)

# Those that import jax, for seconds, before they can say anything.
IMPORT_JAX = ("train", "cache-latents", "export", "convert", "evaluate", "sweep", "strip", "serve")
CLOSED_PIPE = 141  # the exit code of what SIGPIPE ends


@contextmanager
def end_at_closed_pipe() -> Iterator[None]:
    """SystemExit with CLOSED_PIPE if the reader of stdout has gone, as in `jaxdiff ... | head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, not in the interpreter's last moments
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(CLOSED_PIPE) from None


def run(command: str, arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0 done, 2 bad input, 130 interrupted.

    Each command is a module of this folder (_ for -) with a function `run(arguments)`. It is
    imported only when needed, so that `--help` does not wait for jax.
    """
    warnings.showwarning = _warn
    SHUTDOWN_REQUESTED.clear()
    if command in IMPORT_JAX and sys.stderr.isatty() and not {"-h", "--help"} & {*arguments}:
        print(f"{command}: loading", file=sys.stderr)
    try:
        module = importlib.import_module(f"jaxdiff.cli.{command.replace('-', '_')}")
        with end_at_closed_pipe():
            module.run(rename_options(arguments, former_options(command)))
    except (InputError, KeyboardInterrupt) as error:
        return report(command, error)
    except OSError as error:
        if error.filename is None:  # of no file that a user has named
            raise
        return report(command, unusable_file(error))
    finally:
        SHUTDOWN_REQUESTED.set()
    return 0


def unusable_file(error: OSError) -> InputError:
    """What the operating system says of a file or folder, as one sentence."""
    name = os.fsdecode(error.filename)
    shown = name if len(name) <= 100 else f"{name[:80]}... ({len(name)} characters)"
    return InputError(
        f"{shown}: got {os_error_message(error)}, expected a file or folder that can be used"
    )


def report(command: str, error: BaseException) -> int:
    """Print on stderr what ended a command and return the exit code."""
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if isinstance(error, InputError):
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print(f"{command}: interrupted{str(error) and f', {error}'}", file=sys.stderr)
        return 130
    traceback.print_exception(error)
    return 1


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line on stderr, without its location in the code."""
    print(f"warning: {message}", file=sys.stderr)
    if str(message).startswith("Error reading persistent compilation cache entry"):
        from jaxdiff.pipeline import cache  # jax gave the warning, so it is loaded

        cache.prune_corrupt()


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"jaxdiff {jaxdiff.__version__}")
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        with end_at_closed_pipe():
            print(USAGE)
        sys.exit(0 if arguments else 2)
    try:
        one_of("command", arguments[0], COMMANDS)
    except InputError as error:
        print(f"jaxdiff: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(arguments[0], arguments[1:]))
