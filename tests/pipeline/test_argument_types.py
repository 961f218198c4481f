"""Arguments of another type than theirs are one sentence, not a traceback from within.

The calls are made by a process of its own: in tests a type checker would refuse them first.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

import jaxdiff
from jaxdiff.core.errors import InputError
from jaxdiff.pipeline.cascade import hires_fix, refine
from jaxdiff.training.config import (
    DataConfig,
    EMAConfig,
    LoRA,
    MeshConfig,
    TrainConfig,
    VAEObjective,
)

PROMPT = "a small red circle"
VAE_TRAINING = functools.partial(TrainConfig, objective=VAEObjective(), batch_size=8)
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"steps": "3"}, "steps: got '3', expected an integer"),
    ({"steps": 2.5}, "steps: got 2.5, expected an integer"),
    ({"steps": [2, 2.5]}, "steps: got 2.5, expected an integer"),
    ({"steps": True}, "steps: got True, expected an integer"),
    ({"seed": "a"}, "seed: got 'a', expected an integer"),
    ({"seed": 1.5}, "seed: got 1.5, expected an integer"),
    ({"seed": [1, 1.5]}, "seed: got 1.5, expected an integer"),
    ({"guidance_scale": "x"}, "guidance_scale: got 'x', expected a number"),
    ({"guidance": ["cfg"]}, r"guidance: got \['cfg'\], expected a string"),
    ({"sampler": ["ddim"]}, r"sampler: got \['ddim'\], expected a string"),
    ({"timestep_spacing": [1]}, "timestep_spacing: got 1, expected a string"),
    ({"height": "16"}, "height: got '16', expected an integer"),
    ({"width": [16]}, r"width: got \[16\], expected an integer"),
    ({"prompt_syntax": "no"}, "prompt_syntax: got 'no', expected true or false"),
    ({"clip_skip": 0.5}, "clip_skip: got 0.5, expected an integer"),
    ({"negative_prompt": 5}, "negative_prompt: got 5, expected a string"),
    ({"eta": "x"}, "eta: got 'x', expected a number"),
    ({"latents": "x"}, "latents: got 'x', expected an array"),
    ({"batch_size": "x"}, "batch_size: got 'x', expected an integer"),
    ({"batch_size": 0}, "batch_size: got 0, expected a number above 0"),
    ({"vae_tile": 4.0}, "vae_tile: got 4.0, expected an integer"),
    ({"intermediate_steps": 1}, "intermediate_steps: got 1, expected a list"),
    ({"callback": 3}, r"callback: got 3, expected a function of \(done, steps\)"),
    ({"output": 3}, "output: got 3, expected a string"),
]


def changed(**changes: Any) -> Callable[[Any], Any]:
    """A call that generates a request with `changes`."""
    return lambda pipe: pipe.generate([dataclasses.replace(pipe.resolve(PROMPT)[0], **changes)])


CALLS: list[tuple[Callable[[Any], Any], str]] = [
    *((lambda pipe, o=options: pipe(PROMPT, **o), message) for options, message in OPTIONS),
    (lambda pipe: pipe(5), "prompt: got 5, expected a string"),
    (lambda pipe: pipe(b"a star"), "prompt: got b'a star', expected a string"),
    (lambda pipe: pipe(["a star", None]), "prompt: got None, expected a string"),
    (lambda pipe: pipe({"a star"}), "prompt: got {'a star'}, expected a string"),
    (changed(steps=2.0), "steps: got 2.0, expected an integer"),
    (changed(prompt=None), "prompt: got None, expected a string"),
    (changed(sampler=1), "sampler: got 1, expected a string"),
    (lambda pipe: pipe.generate([], batchsize=7), "argument: got 'batchsize'.*batch_size"),
    (lambda pipe: pipe.resolve(PROMPT, callback=print), "callback: got no option of requests"),
    (lambda pipe: pipe.decode_latents((4, 4)), r"latents: got \(4, 4\), expected an array"),
    (lambda pipe: pipe.decode_latents(np.zeros((4, 4))), r"latents: got shape \(4, 4\)"),
    (lambda pipe: pipe.set_guidance_model("x"), "guidance_model: got 'x', expected a pipeline"),
    (lambda pipe: pipe.load_clip("none"), r"clip: got none \(no such folder\)"),
    (lambda pipe: pipe.load_classifier("none"), r"classifier: got none \(no such folder\)"),
    (lambda pipe: pipe.load_lora("none"), "none: got no such file"),
    (lambda pipe: pipe.set_loras({"a": 1}), r"lora: got 'a', .*\(none is\)"),
    (lambda pipe: jaxdiff.load(torch_dtype="half"), "dtype: got 'half'"),
    (lambda pipe: jaxdiff.load(mesh=4), "mesh: got 4, expected sizes"),
    (lambda pipe: jaxdiff.load(mesh={"fsdp": 2.0}), "mesh.fsdp: got 2.0, expected an integer"),
    (lambda pipe: jaxdiff.load(mesh={"fsdp": 3}), "mesh: got fsdp 3, expected sizes whose"),
    (lambda pipe: jaxdiff.train("x", "none"), "config: got 'x', expected a TrainConfig"),
    (lambda pipe: VAE_TRAINING(steps="5"), "steps: got '5', expected an integer"),
    (lambda pipe: VAE_TRAINING(steps=2.5), "steps: got 2.5, expected an integer"),
    (lambda pipe: VAE_TRAINING(steps=2, mesh={"fsdp": 2}), "mesh: got .*, expected MeshConfig"),
    (lambda pipe: VAE_TRAINING(steps=2, dtype=None), "dtype: got None, expected a string"),
    (lambda pipe: MeshConfig(fsdp="2"), "mesh.fsdp: got '2', expected an integer"),
    (lambda pipe: DataConfig(resolution=64.0), "data.resolution: got 64.0, expected an integer"),
    (lambda pipe: EMAConfig(power_stds="0.1"), "ema.power_stds: got '0.1', expected a list"),
    (lambda pipe: LoRA(target_modules=[1]), r"objective.trainable.target_modules: got \[1\]"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each of CALLS says, in a process without a type checker."""
    folder = tiny.write_tiny(tmp_path_factory.mktemp("types") / "tiny")
    command = [sys.executable, __file__, str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_another_type_is_one_sentence(answers, number):
    _, message = CALLS[number]
    assert re.match(f"^InputError: {message}", answers[number]), answers[number]


def test_numbers_of_numpy_are_numbers(single):
    given = single.resolve(PROMPT, seed=np.arange(2), steps=np.int64(3), height=np.int32(16))
    assert (given.seeds, given.steps, given.height) == ((0, 1), 3, 16)
    assert all(type(value) is int for value in (given.steps, given.height, *given.seeds))
    assert single.resolve(PROMPT, guidance_scale=np.float32(2)).guidance_scales == (2.0,)


def test_images_of_several_sizes_are_several_images(single):
    images = [Image.new("RGB", (side, side)) for side in (16, 24)]
    assert len(single.resolve(PROMPT, image=images)) == 2


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("hires_scale", lambda pipe, **options: hires_fix(pipe, PROMPT, scale=1.5, **options)),
        ("refiner", lambda pipe, **options: refine(pipe, pipe, PROMPT, **options)),
    ],
)
def test_second_passes_refuse_masks(single, name, run):
    images = {"image": Image.new("RGB", (16, 16)), "mask": Image.new("L", (16, 16))}
    with pytest.raises(InputError, match=f"^{name}: got it with a mask"):
        run(single, **images)


def answer(call: Callable[[Any], Any], pipe: Any) -> str:
    """What `call` raises."""
    try:
        return f"returned {call(pipe)!r:.60}"
    except InputError as error:
        return f"InputError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    loaded = jaxdiff.load(pathlib.Path(sys.argv[1]))
    print(json.dumps([answer(call, loaded) for call, _ in CALLS]))
