"""Each objective with what its training reads, shows and leaves behind."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from PIL import Image

from jaxdiff.checkpoints.components import Component, write_component
from jaxdiff.core.types import Array, Dtype, Float, NDArray, PyTree
from jaxdiff.data.batches import batches
from jaxdiff.data.scenes import SceneSource
from jaxdiff.models.build import abstract, assemble
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.training.config import TrainConfig, VAEObjective
from jaxdiff.training.objectives import Learner, Params
from jaxdiff.training.objectives.vae import latent_moments, reconstruct, vae_learner

SHOWN = 16  # pictures in a sample grid
VALIDATED = 256  # validation pictures behind a number in the log
MEASURED = 2048  # training pictures from which the latents' standard deviation is measured
MEASURED_AT_ONCE = 64


class Experiment(NamedTuple):
    """One objective wired up. `sample` and `export` are given EMA weights."""

    learner: Learner
    frozen: PyTree
    batches: Any  # Batches with set_state
    sample: Callable[[int, Params], Mapping[str, float]]  # writes a grid, returns measures
    export: Callable[[Params, pathlib.Path], None]  # writes component folders


def grid(images: Float[NDArray, "n h w c"], columns: int) -> Image.Image:
    """Pictures in [-1, 1] row by row, as one picture."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    canvas = np.ones((rows * columns, h, w, c), np.float32)
    canvas[:n] = images
    joined = canvas.reshape(rows, columns, h, w, c).swapaxes(1, 2)
    pixels = np.round((joined.reshape(rows * h, columns * w, c).clip(-1, 1) + 1) * 127.5)
    return Image.fromarray(pixels.astype(np.uint8))


def save_grid(folder: pathlib.Path, step: int, picture: Image.Image) -> None:
    """Write `folder`/step_XXXXXX.png, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.png"
    temporary = path.with_suffix(".part")
    picture.save(temporary, format="PNG")
    temporary.replace(path)


def psnr(images: Float[NDArray, "n h w c"], other: Float[NDArray, "n h w c"]) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], from the mean of their errors."""
    error = np.mean((images.astype(np.float64) - other.clip(-1, 1)) ** 2)
    return float(10 * np.log10(4 / error))


def process_share() -> dict[str, int]:
    """Which part of every batch this process reads."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def vae_experiment(config: TrainConfig, workdir: pathlib.Path, dtype: Dtype) -> Experiment:
    """Pictures alone; reconstructions of validation pictures with their PSNR."""
    objective = cast(VAEObjective, config.objective)
    source = SceneSource(seed=config.data.seed, split="train")
    held_back = SceneSource(seed=config.data.seed, split="validation")
    shown = next(batches(held_back, batch_size=VALIDATED))["image"]
    template = abstract(AutoencoderKL, objective.model, dtype=dtype)

    @jax.jit
    def rebuild(params: Params, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return reconstruct(assemble(template, params), images)

    def sample(step: int, params: Params) -> Mapping[str, float]:
        rebuilt = np.asarray(rebuild(params, shown))
        pair = np.concatenate([shown[:SHOWN], rebuilt[:SHOWN]])
        save_grid(workdir / "samples", step, grid(pair, SHOWN))
        return {"validation_psnr": psnr(shown, rebuilt)}

    moments = jax.jit(lambda params, images: latent_moments(assemble(template, params), images))

    def export(params: Params, folder: pathlib.Path) -> None:
        stream = batches(source, batch_size=MEASURED_AT_ONCE)
        parts = [moments(params, next(stream)["image"]) for _ in range(MEASURED // MEASURED_AT_ONCE)]
        mean, square = np.mean(np.asarray(parts, np.float64), axis=0)
        # A shift would bring the mean to 0, but StableDiffusionPipeline does not apply one.
        scaled = dataclasses.replace(
            objective.model, scaling_factor=float(1 / np.sqrt(square - mean**2)), shift_factor=None
        )
        module = assemble(abstract(AutoencoderKL, scaled), params)
        write_component(folder, Component(module=module))

    stream = batches(source, batch_size=config.batch_size, **process_share())
    return Experiment(vae_learner(objective, dtype), {}, stream, sample, export)
