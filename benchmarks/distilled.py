"""A guidance-distilled model beside its teacher: the same images at half the cost?

    python benchmarks/distilled.py EXPORT [--prompt-stride 4] [--scales 1 2 3 5]

Both generate the same scene prompts, none of which was trained on, from the same initial noise with
a deterministic sampler. For each scale: how far the student's latents end from the teacher's, how
far those of the plain conditional teacher (scale 1) do, as fractions of the teacher's length; in
how many images everything is correct; network evaluations and seconds per image.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

import jaxdiff
from jaxdiff.core.types import Float, NDArray
from jaxdiff.evaluation.alignment import accuracies
from jaxdiff.scenes.judge import answers, score_images, standard_prompts
from jaxdiff.scenes.source import ScenePrompt

BATCH = 64


class Drawn:
    """All prompts drawn by one model at one scale."""

    def __init__(self, pipe: jaxdiff.Pipeline, prompts: list[ScenePrompt], scale: float) -> None:
        texts, size = [p.text for p in prompts], min(BATCH, len(prompts))
        call: dict[str, Any] = {"guidance_scale": scale, "batch_size": size, "output": "latent"}
        pipe(texts[:1], **call)  # compiles
        output = pipe(texts, seed=list(range(len(texts))), **call)
        rows = -(-len(texts) // size) * size
        self.latents: Float[NDArray, "n h w c"] = np.asarray(output.images)
        self.seconds = (output.timings["total_s"] - output.timings["compile_s"]) / rows
        self.evaluations = pipe.nfe(output.request)
        images = pipe.decode_latents(self.latents)
        found = accuracies(answers(prompts, score_images(prompts, images)))
        self.right = [found[f"{kind} correct"].value for kind in ("one object", "two objects")]

    def away(self, other: "Drawn") -> float:
        """The median distance of the latents from those of `other`, as a share of their length."""
        difference, length = (
            np.linalg.norm(z.reshape(len(z), -1), axis=1)
            for z in (self.latents - other.latents, other.latents)
        )
        return float(np.median(difference / length))


def main() -> None:
    """Print one row for each scale."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("student", type=pathlib.Path)
    parser.add_argument("--teacher", help="the embedded model when left out")
    parser.add_argument("--scales", nargs="+", type=float, default=[1, 2, 3, 5, 7.5, 10])
    parser.add_argument("--prompt-stride", type=int, default=4, help="use every n-th prompt")
    args = parser.parse_args()
    prompts = standard_prompts()[:: args.prompt_stride]
    teacher, student = jaxdiff.load(args.teacher), jaxdiff.load(str(args.student))
    plain = Drawn(teacher, prompts, 1.0)
    names = "one object correct | two objects correct"
    print(f"| scale | student away | plain away | {names} | evaluations | s |")
    print("|---|---|---|---|---|---|---|")
    for scale in args.scales:
        taught, guided = Drawn(student, prompts, scale), Drawn(teacher, prompts, scale)
        distances = f"{taught.away(guided):.2f} | {plain.away(guided):.2f}"
        rights = [f"{s:.2f}, {t:.2f}" for s, t in zip(taught.right, guided.right, strict=True)]
        cost = f"{taught.evaluations}, {guided.evaluations}"
        time = f"{taught.seconds:.2f}, {guided.seconds:.2f}"
        print(f"| {scale:g} | {distances} | {' | '.join(rights)} | {cost} | {time} |", flush=True)


if __name__ == "__main__":
    main()
