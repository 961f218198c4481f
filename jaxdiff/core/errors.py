"""The one exception that means "the user's input is wrong"."""


class InputError(ValueError):
    """Bad input, as one sentence `name: got X, expected Y`; the command line prints it and exits with 2."""
