"""What takes input from users: each target makes one odd input of a seed, and hands it over.

Right is a result or an InputError. A result with images must not be black in silence.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import captioned_images
import numpy as np
import originals
import pickles
import tiny
from PIL import Image

import jaxdiff
from fuzz.mutations import (
    ODD_TEXT,
    ODD_VALUES,
    Random,
    choice,
    mutate_bytes,
    mutate_json,
    mutate_json_file,
    mutate_safetensors,
    text,
)
from jaxdiff.checkpoints.description import describe
from jaxdiff.checkpoints.models import read_model
from jaxdiff.cli import generate, train
from jaxdiff.core.configs import from_mapping_recursive, to_mapping
from jaxdiff.experiments.datasets import open_dataset
from jaxdiff.generation.prompt_file import PromptSpec, make_jobs, read_prompt_file
from jaxdiff.training.config import DataConfig, TrainConfig, VAEObjective

Target = Callable[[Random, pathlib.Path], object]
TARGETS: dict[str, Target] = {}


def target(function: Target) -> Target:
    """Register a function that makes an odd input in a folder and reads it."""
    TARGETS[function.__name__] = function
    return function


DRAWING_S = 60  # for an image, compiling included


class BlackImageError(Exception):
    """A black image without a word."""


@functools.cache
def bases() -> pathlib.Path:
    """A folder with a whole input of every kind."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
    tiny.write_tiny(folder / "model")
    pipe = jaxdiff.load(folder / "model", "float32")
    tiny.write_lora(pipe, folder / "lora.safetensors", 1)
    inversion = {"sks": np.ones((2, 8), np.float32)}
    originals.write_safetensors(folder / "word.safetensors", inversion)
    parts = originals.components("sd1")
    tensors = originals.original_tensors("sd1", parts)
    originals.write_safetensors(folder / "sd1.safetensors", tensors)
    tiny.write_vaes(folder, tensors)
    storages = {
        n: pickles.Storage(str(i), "FloatStorage", v.ravel())
        for i, (n, v) in enumerate(tensors.items())
    }
    strides = {
        n: tuple(s // v.itemsize for s in np.ascontiguousarray(v).strides)
        for n, v in tensors.items()
    }
    root = {n: pickles.Tensor(storages[n], 0, v.shape, strides[n]) for n, v in tensors.items()}
    with mock.patch.dict(sys.modules, pickles.torch_modules()):
        pickles.save(folder / "sd1.ckpt", {"state_dict": root}, *storages.values())
        word = pickles.Storage("0", "FloatStorage", np.ones(16))
        root = {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": pickles.Tensor(word, 0, (2, 8), (8, 1))},
        }
        pickles.save(folder / "word.pt", root, word)
    for form in ("png", "jpg", "webp", "gif", "tiff", "bmp"):
        kind = {"jpg": "JPEG", "tiff": "TIFF"}.get(form, form.upper())
        (folder / f"image.{form}").write_bytes(captioned_images.encoded(3, (16, 16), kind))
    captioned_images.write_folder(folder / "folder", 4)
    captioned_images.write_folder(folder / "table", 4, table=True)
    captioned_images.write_tar(folder / "tars/a.tar", range(4))
    captioned_images.write_parquet(folder / "parquet/a.parquet", range(4))
    captioned_images.write_array_record(folder / "records/a.array_record", range(4))
    return folder


@functools.cache
def pipe() -> Any:
    """A model that is only read from, on one device."""
    loaded = jaxdiff.load(bases() / "model", "float32")
    return tiny.with_linear_unet(tiny.first_devices(loaded, 1))


def mutated(rng: Random, source: str, folder: pathlib.Path, mutate: Any) -> pathlib.Path:
    """The mutated copy of a base file in `folder`."""
    path = folder / pathlib.Path(source).name
    path.write_bytes(mutate(rng, (bases() / source).read_bytes()))
    return path


def check_images(model: Any, *arguments: Any, **options: Any) -> None:
    """BlackImageError if a model draws black; what is not finite is an error of its own.

    It compiles first, for which there is more time.
    """
    signal.setitimer(signal.ITIMER_PROF, DRAWING_S)
    images = model(*arguments, steps=1, output="numpy", **options).images
    if not np.isfinite(images).all() or not images.any():
        raise BlackImageError("got a black image, expected a word about it")


@target
def safetensors_checkpoint(rng: Random, folder: pathlib.Path) -> None:
    path = mutated(rng, "sd1.safetensors", folder, mutate_safetensors)
    if rng.random() < 0.2:
        path = path.rename(path.with_suffix(choice(rng, (".ckpt", ".bin", ".png", ""))))
    describe(path)
    model = jaxdiff.load(path, "float32")
    if rng.random() < 0.02:
        check_images(model, "a star", height=64, width=64)


@target
def pickled_checkpoint(rng: Random, folder: pathlib.Path) -> None:
    path = mutated(rng, "sd1.ckpt", folder, mutate_bytes)
    describe(path)
    jaxdiff.load(path, "float32")


@target
def vae(rng: Random, folder: pathlib.Path) -> None:
    half = "taesd_decoder.safetensors"
    source = choice(rng, ("vae.safetensors", "taesd.safetensors", half))
    path = mutated(rng, source, folder, mutate_safetensors)
    if source == half and rng.random() < 0.8:
        mutated(rng, "taesd_encoder.safetensors", folder, lambda _, data: data)
    describe(path)
    read_model(bases() / "model", vae=path, only=("vae",))


@target
def model_folder(rng: Random, folder: pathlib.Path) -> None:
    model = shutil.copytree(bases() / "model", folder / "model")
    file = choice(rng, sorted(path for path in model.rglob("*") if path.is_file()))
    roll = rng.random()
    if file.suffix == ".json":
        file.write_bytes(mutate_json_file(rng, file.read_bytes()))
    elif file.suffix == ".safetensors":
        file.write_bytes(mutate_safetensors(rng, file.read_bytes()))
    elif roll < 0.5:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    elif roll < 0.75:
        file.write_bytes(choice(rng, ODD_TEXT))
    else:
        file.unlink()
    describe(model)
    loaded = jaxdiff.load(model, "float32")
    loaded.resolve("a star", seed=1)
    if rng.random() < 0.05:
        check_images(loaded, "a star")


@target
def lora(rng: Random, folder: pathlib.Path) -> None:
    path = mutated(rng, "lora.safetensors", folder, mutate_safetensors)
    describe(path)
    model = jaxdiff.load(bases() / "model", "float32")
    model.load_lora(path, choice(rng, (1.0, 0.0, -1.0, 1e30)))


@target
def textual_inversion(rng: Random, folder: pathlib.Path) -> None:
    source = choice(rng, ("word.safetensors", "word.pt"))
    mutate = mutate_bytes if source.endswith(".pt") else mutate_safetensors
    path = mutated(rng, source, folder, mutate)
    describe(path)
    jaxdiff.load(bases() / "model", "float32").load_textual_inversion(path)


@target
def initial_image(rng: Random, folder: pathlib.Path) -> None:
    form = choice(rng, ("png", "jpg", "webp", "gif", "tiff", "bmp"))
    if rng.random() < 0.6:
        path = mutated(rng, f"image.{form}", folder, mutate_bytes)
    else:
        path, size = folder / "a.png", [int(n) for n in rng.integers(1, 90, 2)]
        mode = choice(
            rng, ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I", "F", "I;16", "CMYK", "YCbCr")
        )
        image = Image.new("L", (size[0], size[1]), int(rng.integers(256)))
        try:
            image.convert(mode).save(path)
        except (OSError, ValueError):  # Pillow has no such image
            image.save(path)
    options = {"mask": path} if rng.random() < 0.3 else {}
    requests = pipe().resolve("a star", image=path, strength=0.5, **options)
    if rng.random() < 0.02:
        check_images(pipe(), requests)


@target
def prompt(rng: Random, folder: pathlib.Path) -> None:
    del folder
    words = {"prompt": text(rng)}
    if rng.random() < 0.5:
        words["negative_prompt"] = text(rng)
    requests = pipe().resolve(**words, prompt_syntax=bool(rng.random() < 0.9))
    if rng.random() < 0.02:
        check_images(pipe(), requests)


@target
def option(rng: Random, folder: pathlib.Path) -> None:
    """Options of a call that are of any type and size."""
    del folder
    names = ("steps", "guidance_scale", "sampler", "guidance", "timestep_spacing", "eta", "height")
    names += ("width", "seed", "clip_skip", "strength", "denoising_end", "negative_scale")
    odd = (
        *ODD_VALUES,
        "ddim:eta=2",
        "euler:s_churn=-1",
        "cfg+rescale:phi=9",
        "apg:eta=nan",
        "+",
        ":",
    )
    good = (2, 3, 16, 1.5, "ddim", "euler", "karras", "cfg", "apg+rescale", "heun:s_churn=5")
    options = {choice(rng, names): choice(rng, (*odd, *good * 3)) for _ in range(2)}
    pipe().resolve("a star", **options)


@target
def command_line(rng: Random, folder: pathlib.Path) -> None:
    """Arguments of generate, up to the model."""
    names = [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(generate.Options)]
    names = [name for name in names if name not in ("--from-image", "--prompts")]
    arguments = [text(rng)]
    for _ in range(int(rng.integers(4))):
        arguments += [
            choice(rng, names),
            choice(rng, ("1", "-1", "x", "nan", "", "1e9", "0.5", text(rng))),
        ]
    options, stored, _ = generate._parsed([each for each in arguments if "\0" not in each])
    jobs = generate._jobs(options, stored)
    generate.Manifest.of(folder, vars(options), generate._files(options, jobs)).read(jobs)


@target
def prompt_file(rng: Random, folder: pathlib.Path) -> None:
    if rng.random() < 0.3:
        path = folder / "prompts.txt"
        path.write_bytes(
            mutate_bytes(rng, "\n".join(text(rng) for _ in range(3)).encode("utf-8", "replace"))
        )
    else:
        path = folder / "prompts.jsonl"
        line = {"prompt": text(rng), "seed": 3, "steps": 5, "guidance_scale": 2.0, "num_images": 2}
        lines = [json.dumps(line), json.dumps(mutate_json(rng, line))]
        tail = b"\n" + choice(rng, ODD_TEXT) if rng.random() < 0.2 else b""
        path.write_bytes("\n".join(lines).encode() + tail)
    for job in make_jobs(read_prompt_file(path), PromptSpec(prompt=""), numbered=True)[:3]:
        pipe().resolve(job.spec.prompt, seed=job.seed, steps=job.spec.steps)


@target
def data_set(rng: Random, folder: pathlib.Path) -> None:
    """Stored images with captions, of which one file is broken."""
    kind = choice(rng, ("folder", "table", "tars", "parquet", "records"))
    data = shutil.copytree(bases() / kind, folder / kind)
    file = choice(rng, sorted(path for path in data.rglob("*") if path.is_file()))
    file.write_bytes(
        choice(rng, ODD_TEXT) if rng.random() < 0.1 else mutate_bytes(rng, file.read_bytes())
    )
    config = DataConfig(
        kind="folder" if kind == "table" else kind,
        path=str(data),
        resolution=64,
        max_bad_fraction=1.0,
        cache_dir=str(folder / "cache"),
    )
    opened = open_dataset(config, 2)
    for index in range(min(4, len(opened.validation))):
        opened.validation[index]


@target
def training_config(rng: Random, folder: pathlib.Path) -> None:
    del folder
    config = to_mapping(TrainConfig(objective=VAEObjective(), steps=4, batch_size=2))
    plain = json.loads(json.dumps(config))
    from_mapping_recursive(TrainConfig, mutate_json(rng, plain), source="config.json")


@target
def training_options(rng: Random, folder: pathlib.Path) -> None:
    names = ("--steps", "--batch-size", "--optimiser.learning-rate", "--data.path", "--ema.decay")
    names += (
        "--mesh.fsdp",
        "--seed",
        "--dtype",
        "--data.kind",
        "--log-every",
        "--wandb",
        "--objective",
    )
    arguments = ["configs/scenes_vae.py", "--workdir", str(folder)]
    for _ in range(2):
        arguments += [
            choice(rng, names),
            choice(rng, ("1", "0", "-1", "x", "nan", "1e400", "", "None")),
        ]
    train.parse(arguments)
