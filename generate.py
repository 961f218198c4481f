"""Draw pictures from prompts: `python generate.py "a small red circle"`."""

import sys

from jaxdiff.cli.main import run

if __name__ == "__main__":
    sys.exit(run("generate", sys.argv[1:]))
