"""The one exception that means "the user's input is wrong"."""


class InputError(ValueError):
    """Bad input, in one sentence `name: got X, expected Y`; the command line exits with 2."""
