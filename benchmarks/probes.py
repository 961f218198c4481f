"""What linear probes find in a text encoder's states: the relation, and which object is where.

    PYTHONPATH=. python benchmarks/probes.py                      # the embedded model
    PYTHONPATH=. python benchmarks/probes.py runs/scenes_clip/export

A UNet reads the text through linear maps of these states. What no linear map finds there, such as
the colour of the left or upper object, it has to work out by itself, from two objects, their order
and the relation. Each probe is ridge regression from the states at one position to an answer, of
CAPTIONS two-object captions, judged on the last TEST of them. Prints a table: one row a position,
the fraction of right answers in percent.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.embedded import EMBEDDED
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, Int, NDArray
from jaxdiff.data.tokenizer import load_tokenizer, tokenize
from jaxdiff.scenes.captions import describe
from jaxdiff.scenes.source import sample_scene
from jaxdiff.scenes.specification import COLOURS, RELATIONS, SHAPES, Scene, arrangement

CAPTIONS, TEST = 6000, 1000
RIDGE = 1e-2
BATCH = 500
# What is asked, and by how many answers.
ANSWERS = {
    "relation": len(RELATIONS),
    "first said: colour": len(COLOURS),
    "left or upper: colour": len(COLOURS),
    "left or upper: shape": len(SHAPES),
    "right or lower: colour": len(COLOURS),
}


def answers(scene: Scene) -> list[int]:
    """The right answers, in the order of ANSWERS."""
    (first, second), _ = arrangement(scene)
    return [
        RELATIONS.index(str(scene.relation)),
        COLOURS.index(scene.objects[0].colour),
        COLOURS.index(first.colour),
        SHAPES.index(first.shape),
        COLOURS.index(second.colour),
    ]


def probed(states: Float[NDArray, "b d"], right: Int[NDArray, "b"], choices: int) -> float:
    """The fraction of right answers of a linear probe on the captions that it has not seen."""
    inputs = np.concatenate([states, np.ones((len(states), 1))], axis=1).astype(np.float64)
    train, test = inputs[:-TEST], inputs[-TEST:]
    wanted = np.eye(choices)[right[:-TEST]]
    gram = train.T @ train + RIDGE * np.eye(train.shape[1])
    found = (test @ np.linalg.solve(gram, train.T @ wanted)).argmax(1)
    return float(np.mean(found == right[-TEST:]))


def guessed(right: Int[NDArray, "b"]) -> float:
    """The fraction of right answers by always giving the most frequent one."""
    return float(np.bincount(right).max() / len(right))


def main() -> None:
    """Read, encode, probe, print."""
    parser = argparse.ArgumentParser(description="See the top of the file.")
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=EMBEDDED)
    folder = parser.parse_args().folder
    try:
        encoder = read_component(folder / "text_encoder").module
        tokenizer = load_tokenizer(folder / "tokenizer")
    except InputError as error:
        print(f"probes: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, "train", 2) for _ in range(CAPTIONS)]
    ids = tokenize(tokenizer, [describe(scene) for scene in scenes])
    right = np.array([answers(scene) for scene in scenes])
    run = jax.jit(lambda ids: encoder(ids).astype(jnp.float32))
    states = np.concatenate([run(ids[i : i + BATCH]) for i in range(0, CAPTIONS, BATCH)])
    end = (ids == tokenizer.eos_token_id).argmax(1)
    rows = np.arange(CAPTIONS)
    places = {"end of text": end, "second object's noun": end - 4, "last position": -1}
    places |= {"last but one": -2, "last but two": -3}
    print("position".ljust(24) + "".join(name.rjust(26) for name in ANSWERS))
    for place, at in places.items():
        picked = states[rows, at]
        fractions = [probed(picked, right[:, i], n) for i, n in enumerate(ANSWERS.values())]
        print(place.ljust(24) + "".join(f"{100 * fraction:26.1f}" for fraction in fractions))
    print("guessing".ljust(24) + "".join(f"{100 * guessed(y):26.1f}" for y in right.T))


if __name__ == "__main__":
    main()
