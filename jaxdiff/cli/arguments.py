"""The options of a command, with one sentence for arguments that it does not have."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro

from jaxdiff.core.errors import InputError
from jaxdiff.core.names_elsewhere import did_you_mean

T = TypeVar("T")
_POSITIONAL = tyro.conf.Positional[Any].__metadata__[0]


def parse(
    options: type[T],
    arguments: Sequence[str],
    *,
    prog: str,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> T:
    """The dataclass `options` that the `arguments` of the command `prog` describe.

    `defaults` are what the help shows for fields that are None. Prints help (exit code 0), or what
    tyro says of values (2). InputError for an unknown option, which proposes the nearest name.
    """
    found, unknown = tyro.cli(
        _with_help(options, defaults),
        args=arguments,
        prog=prog,
        config=(tyro.conf.DisallowNone,),
        return_unknown_args=True,
    )
    check_unknown(unknown, options, prog)
    return found


def check_unknown(unknown: Sequence[str], options: Any, prog: str) -> None:
    """InputError for the first of the `unknown` arguments of a command with these `options`."""
    names = list(_names(options, "--"))
    for argument in unknown:
        name = argument.partition("=")[0]
        if not name.startswith("-"):
            raise InputError(f"{name}: got an unknown argument, expected one of `{prog} --help`")
        if name in _names(options, "--", positional=True):
            raise InputError(f"{name}: got an unknown option, expected its value alone")
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
