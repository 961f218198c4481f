"""Train a model: python train.py configs/NAME.py --workdir runs/NAME [--any.field value]."""

import sys

from jaxdiff.cli.main import run

if __name__ == "__main__":
    sys.exit(run("train", sys.argv[1:]))
