"""The checker behind the annotations: beartype, with int accepted for float as PEP 484 says."""

import functools
import inspect
import typing

import jaxtyping
from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped


def check(function):
    """Checked by beartype, which reads the annotations at the first call: most get none."""
    checked = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal checked
        if checked is None:
            checked = _beartype(function)
        return checked(*args, **kwargs)

    return call


def install(package: str) -> None:
    """Check every annotated function and dataclass of a package that is not imported yet.

    jaxtyping compares the shapes of arguments with one another, for which it binds them at every
    call and writes two programs for every function, those inside functions included. So it is
    spared where no annotation has a shape: there beartype checks alone.
    """
    jaxtyping.jaxtyped = _with_shapes  # which the import hook writes above every function
    jaxtyping.install_import_hook(package, "typechecker.check")


def _with_shapes(*, typechecker):
    def decorate(item):
        if inspect.isclass(item):  # a dataclass, unless something else reads its arguments first
            wrapped = hasattr(item.__init__, "__wrapped__")
            return item if wrapped else _jaxtyped(item, typechecker=typechecker)
        if any(map(_has_shape, item.__annotations__.values())):
            return _jaxtyped(item, typechecker=typechecker)
        return typechecker(item) if item.__annotations__ else item

    return decorate


def _has_shape(hint) -> bool:
    if isinstance(hint, list):  # the arguments of a Callable
        return any(map(_has_shape, hint))
    of_jaxtyping = type(hint).__module__.startswith("jaxtyping")
    return isinstance(hint, str) or of_jaxtyping or any(map(_has_shape, typing.get_args(hint)))
