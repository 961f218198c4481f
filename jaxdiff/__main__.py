"""`python -m jaxdiff COMMAND ...`."""

from jaxdiff.cli.main import main

main()
