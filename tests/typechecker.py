"""The checker behind the annotations: beartype, with int accepted for float as PEP 484 says."""

import functools

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


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
