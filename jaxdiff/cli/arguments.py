"""The options of a command, with one sentence for arguments that it does not have."""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro

from jaxdiff.core.errors import InputError
from jaxdiff.core.names_elsewhere import did_you_mean

T = TypeVar("T")
KINDS = {"INT": "an integer", "FLOAT": "a number", "PATH": "a path"}  # of values, by tyro's names
_POSITIONAL = tyro.conf.Positional[Any].__metadata__[0]


def parse(
    options: type[T],
    arguments: Sequence[str],
    *,
    prog: str,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> T:
    """The dataclass `options` that the `arguments` of the command `prog` describe.

    `defaults` are what the help shows for fields that are None. Prints help (exit code 0).
    InputError for values that do not fit, and for an unknown option with the nearest name.
    """
    with errors_as_sentences(arguments):
        found, unknown = tyro.cli(
            _with_help(options, defaults),
            args=arguments,
            prog=prog,
            config=(tyro.conf.DisallowNone,),
            return_unknown_args=True,
        )
    check_unknown(unknown, options, prog)
    return found


@contextlib.contextmanager
def errors_as_sentences(arguments: Sequence[str]) -> Iterator[None]:
    """Make an InputError of what tyro prints about arguments, in boxes, before it exits with 2."""
    if asks_help(arguments):
        yield
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            yield
    except SystemExit as exit_:
        if exit_.code != 2:
            raise
        raise InputError(_sentence(printed.getvalue())) from None
    sys.stderr.write(printed.getvalue())  # warnings


def asks_help(arguments: Sequence[str]) -> bool:
    """Whether the arguments of a command ask for its help."""
    return bool({"-h", "--help"} & {*arguments})


def _sentence(box: str) -> str:
    """What a box of tyro says of an argument, in this program's words."""
    lines = (line.strip(" │|╭╮╰╯+─-") for line in box.splitlines())
    text, _, described = " ".join(" ".join(lines).split()).partition("Argument helptext:")
    text = re.split(" For full helptext| Got errors:", text)[0].strip(" .")
    if missing := re.search(r"Missing value for argument '(\S+)'", text):
        name = missing[1]
        how = f"; one that begins with a hyphen as {name}=VALUE" if name.startswith("-") else ""
        return f"{name}: got no value, expected one{how}"
    if missing := re.search(r"Missing from .*?: (.*) \(required\)", text):
        return f"got an argument too few, expected {missing[1]}"
    if ours := re.search(r"Error parsing \S+: (\S+: got .*)", text):
        return ours[1]
    if wrong := re.search(r"Error parsing (\S+): .*?(\['.*?'\]|'[^']*')$", text):
        name, value = wrong[1].rpartition("/")[2], wrong[2].strip("[]")
        kind = next((k for k in KINDS if re.search(rf"\b{k}\b", described)), None)
        return f"{name}: got {value}, expected {KINDS[kind] if kind else 'another value'}"
    return text


def check_unknown(unknown: Sequence[str], options: Any, prog: str) -> None:
    """InputError for the first of the `unknown` arguments of a command with these `options`."""
    names = list(_names(options, "--"))
    for argument in unknown:
        name = argument.partition("=")[0]
        if not name.startswith("-"):
            raise InputError(f"{argument:.60}: got an argument too many, expected an option")
        if name in _names(options, "--", positional=True):
            raise InputError(f"{name}: got an unknown option, expected its value without it")
        hint = did_you_mean(name.replace("--no-", "--", 1), names)
        raise InputError(f"{name}: got an unknown option, expected one of `{prog} --help`{hint}")


def _names(options: Any, prefix: str, *, positional: bool = False) -> Iterator[str]:
    """The names of options, or those of `positional` arguments, with those of inner dataclasses."""
    for name, hint in get_type_hints(options, include_extras=True).items():
        if name == "return":
            continue
        metadata = getattr(hint, "__metadata__", ())
        own = [each.name for each in metadata if getattr(each, "name", None) is not None]
        spelled = prefix + (own[-1] if own else name.replace("_", "-"))
        bare = getattr(hint, "__origin__", hint)
        inner = [each for each in (bare, *get_args(bare)) if dataclasses.is_dataclass(each)]
        for each in inner:
            dotted = spelled if spelled == prefix else f"{spelled}."
            yield from _names(each, dotted, positional=positional)
        if not inner and positional is (_POSITIONAL in metadata):
            yield spelled


def _with_help(options: type[T], defaults: Mapping[str, Any]) -> type[T]:
    """The dataclass, whose help shows a default where there is one.

    It is a subclass, since tyro takes such texts from annotations.
    """
    hints = get_type_hints(options, include_extras=True)
    fields = []
    for field in dataclasses.fields(options):  # pyright: ignore[reportArgumentType]
        hint = _shown_default(defaults.get(field.name))
        annotation = Annotated[hints[field.name], tyro.conf.arg(help_behavior_hint=hint)]
        fields.append((field.name, annotation, field))
    return dataclasses.make_dataclass(
        options.__name__, fields, bases=(options,), frozen=True, kw_only=True
    )


def _shown_default(of_model: Any) -> Any:
    """What the help says at the end of an option: its default, or that of the model."""

    def shown(default: str) -> str:
        value = default if of_model is None else str(of_model)
        return "" if value in ("", "None", "()") else f"(default: {value})"

    return shown


def has_option(arguments: Sequence[str], option: str) -> bool:
    """Whether `option` is among the arguments, as in --plan v5e:2x4 or --plan=v5e:2x4."""
    return any(each.partition("=")[0] == option for each in arguments)
