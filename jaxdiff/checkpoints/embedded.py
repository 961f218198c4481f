"""The model that comes with the package."""

import pathlib

EMBEDDED = pathlib.Path(__file__).parents[1] / "assets" / "scenes"
