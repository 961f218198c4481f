"""How reliable the detector of scenes is.

    PYTHONPATH=. python benchmarks/detector.py [--size 128] [--images 2000] [--vae FOLDER]

Prints the fraction of real drawings whose attributes are named right, clean and degraded, with the
median distance from the clean drawing in decibels. With a VAE also for its reconstructions, from
latents as they are and with noise: the most that images decoded by it can score.
"""

import argparse
import io
import pathlib
from collections.abc import Callable
from typing import cast

import jax
import numpy as np
from PIL import Image
from scipy import ndimage

from jaxdiff.checkpoints.components import read_component
from jaxdiff.core.types import Array
from jaxdiff.evaluation.alignment import accuracies
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.scenes.detector import detect, score
from jaxdiff.scenes.judge import answers
from jaxdiff.scenes.rendering import CANVAS, render
from jaxdiff.scenes.source import ScenePrompt, SceneSource

Degrade = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0))


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(file))


DEGRADED: dict[str, Degrade] = {
    "clean": lambda image, rng: image,
    "noise, sigma 9": lambda image, rng: _bytes(image + rng.normal(0, 9, image.shape)),
    "blur, sigma 0.7": lambda image, rng: _bytes(_blur(image, 0.7)),
    "blur and noise": lambda image, rng: _bytes(_blur(image, 0.6) + rng.normal(0, 5, image.shape)),
    "blur, sigma 1": lambda image, rng: _bytes(_blur(image, 1.0)),
    "JPEG, quality 60": lambda image, rng: _jpeg(image, 60),
}


def decibels(image: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two byte images; 99 for equal ones."""
    error = np.mean((image.astype(float) - other) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else 99.0


def reconstruct(folder: pathlib.Path, noise: float) -> Degrade:
    """An image through the VAE in `folder`, with noise of this deviation added to its latents."""
    vae = cast(AutoencoderKL, read_component(folder).module)

    @jax.jit
    def through(params: dict[str, Array], image: Array, eps: Array) -> Array:
        model = with_params(vae, params)
        mean, _ = model.encode(image[None] / 127.5 - 1)
        return model.decode(model.unscale(model.scale(mean) + noise * eps))[0]

    side = 2 ** (len(vae.config.block_out_channels) - 1)

    def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        shape = (1, image.shape[0] // side, image.shape[1] // side, vae.config.latent_channels)
        eps = rng.normal(size=shape).astype(np.float32)
        image = through(param_dict(vae), image.astype(np.float32), eps)
        return _bytes(127.5 * (np.asarray(image) + 1))

    return degrade


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=CANVAS, help="side of the images in pixels")
    parser.add_argument("--vae", type=pathlib.Path, help="folder of an AutoencoderKL")
    arguments = parser.parse_args()
    num_images, degraded = arguments.images, dict(DEGRADED)
    if arguments.vae:
        for noise in (0.0, 0.2, 0.3):
            degraded[f"VAE, latent noise {noise}"] = reconstruct(arguments.vae, noise)
    for split in ("train", "heldout"):
        source = SceneSource(seed=1, split=split)
        examples = [source.example(i) for i in range(num_images)]
        for how, degrade in degraded.items():
            rng = np.random.default_rng(0)
            images = [render(scene, layout, arguments.size) for scene, layout, _ in examples]
            worse = [degrade(image, rng) for image in images]
            distance = np.median([decibels(a, b) for a, b in zip(images, worse, strict=True)])
            prompts = [ScenePrompt(text=text, scene=scene) for scene, _, text in examples]
            scores = [score(p.scene, detect(w)) for p, w in zip(prompts, worse, strict=True)]
            found = accuracies(answers(prompts, scores))
            columns = "  ".join(f"{name} {accuracy.value:.4f}" for name, accuracy in found.items())
            print(f"{split}, {how} ({distance:.1f} dB): {columns}", flush=True)


if __name__ == "__main__":
    main()
