"""`jaxdiff COMMAND ...`: find the command, run it, turn a user's mistake into one sentence."""

import importlib
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.core.shutdown import SHUTDOWN_REQUESTED
from jaxdiff.core.validate import one_of

COMMANDS = {
    "generate": "draw pictures from prompts",
    "train": "train a model from a config file",
    "cache-latents": "encode pictures once, to train from their latents",
    "export": "gather trained components into one diffusers folder",
    "convert": "write a checkpoint in another layout",
    "inspect": "say what a checkpoint is",
    "evaluate": "measure how well the pictures follow their prompts",
    "sweep": "draw and measure rules of guidance against scales",
    "strip": "draw one picture on its way from noise",
}
USAGE = "usage: jaxdiff COMMAND ...\n\n" + "\n".join(
    f"  {name:13s} {text}" for name, text in COMMANDS.items()
)


def run(command: str, arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0 done, 2 bad input, 130 interrupted.

    Each command is a module of this folder (_ for -) with a function `run(arguments)`, imported
    only when it is asked for, so that `--help` does not wait for jax.
    """
    warnings.showwarning = _warn
    SHUTDOWN_REQUESTED.clear()
    try:
        importlib.import_module(f"jaxdiff.cli.{command.replace('-', '_')}").run(arguments)
    except (InputError, KeyboardInterrupt) as error:
        return report(command, error)
    finally:
        SHUTDOWN_REQUESTED.set()
    return 0


def report(command: str, error: BaseException) -> int:
    """Say on stderr what ended a command, unless it has been said, and return the exit code."""
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if isinstance(error, InputError):
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
    traceback.print_exception(error)
    return 1


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line on stderr, without the place in the code."""
    print(f"warning: {message}", file=sys.stderr)
    if str(message).startswith("Error reading persistent compilation cache entry"):
        from jaxdiff.pipeline import cache  # jax is there, since it warns

        cache.prune_corrupt()


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments else 2)
    try:
        one_of("command", arguments[0], COMMANDS)
    except InputError as error:
        print(f"jaxdiff: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(arguments[0], arguments[1:]))
