"""Whether a change of the code changes what it computes: a grid of calls, trainings, conversions.

    git worktree add ../before HEAD~1 && cd ../before
    PYTHONPATH=.:tests python $OLDPWD/benchmarks/behaviour.py /tmp/models /tmp/before
    cd - && PYTHONPATH=.:tests python benchmarks/behaviour.py /tmp/models /tmp/after
    python benchmarks/behaviour.py --compare /tmp/before /tmp/after

The second and the third line run every case with the package of the folder that they are run in,
on one CPU device, and write what it gives: latents, trained weights, the bytes of converted files.
/tmp/models holds the tiny random models that both read; the first run makes them. `--only TEXT`
runs the cases whose name contains it. The comparison lists every case with its largest absolute
difference, and ends with 1 where one is above `--tolerance` (0: bit for bit) or is there on one
side alone.

Only names that people use appear here (`jaxdiff.load`, options, commands), so the file runs with
any version of the package.
"""

import argparse
import importlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SAMPLERS = (
    *("ddpm", "ddim", "pndm", "euler", "euler-ancestral", "heun", "dpmpp-2s", "dpmpp-2m"),
    *("dpmpp-2m-sde", "dpmpp-3m-sde", "unipc", "lcm"),
)
RULES = (
    *("none", "cfg", "three", "apg", "cfg-pp", "cfg-zero", "pag"),
    *("cfg+rescale:phi=0.7", "cfg+clip", "cfg+threshold", "cfg+interval:lo=0.3,hi=5"),
    *("cfg+adaptive", "cfg+schedule", "apg:eta=0.2+interval:lo=0.3,hi=5"),
)
PROMPTS = ["a small red circle", "a large (blue:1.3) star above a green square"]
CALL = {"seed": [1, 2], "steps": 4, "output": "latent"}
TRAIN = """
import dataclasses
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.training.config import *
UNet2DConditionConfig = type(DiffusionObjective(vae="", text_encoder="").model)
VAE = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2, sample_size=64,
)
CLIP = CLIPObjective(
    text=CLIPTextConfig(vocab_size=1024, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32),
    vision=CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, image_size=64, patch_size=16),
    projection_dim=8,
)
UNET = DiffusionObjective(
    vae="WORK/vae/export", text_encoder="WORK/clip/export", sample_steps=2, evaluated=0,
    model=UNet2DConditionConfig(sample_size=8, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2),
)
OBJECTIVES = {
    "vae": VAEObjective(model=VAE), "clip": CLIP, "unet": UNET,
    "distilled": DistillationObjective(teacher="WORK/unet/export", sample_steps=2),
    "lora": DiffusionObjective(pipeline="MODELS/sd", train=LoRA(rank=2), sample_steps=2,
        evaluated=0),
}
config = TrainConfig(objective=OBJECTIVES["KIND"], steps=3, batch_size=8, sample_every=3,
    log_every=1, checkpoint_every=3, tensorboard=False)
"""
TRAININGS = ("vae", "clip", "unet", "distilled")

Arrays = dict[str, np.ndarray]
Case = tuple[str, Callable[[], Arrays]]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="See the top of the file.")
    parser.add_argument("folders", nargs=2, type=pathlib.Path)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--tolerance", type=float, default=0.0)
    return parser.parse_args()


def make_models(folder: pathlib.Path) -> None:
    """Tiny random models of both families, unless they are there."""
    tiny: Any = importlib.import_module("tiny")  # of tests/
    makers = {"sd": tiny.write_tiny, "xl": tiny.write_xl}
    for name, make in makers.items():
        if not (folder / name / "model_index.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            make(folder / name)


def calls(models: pathlib.Path) -> Iterator[Case]:
    """Every sampler and rule, and the other ways to generate, as latents."""
    import jaxdiff

    pipes: dict[str, Any] = {}

    def call(name: str, prompt: Any = None, **options: Any) -> Callable[[], Arrays]:
        def run() -> Arrays:
            if name not in pipes:
                pipes[name] = jaxdiff.load(None if name == "embedded" else models / name)
            out = pipes[name](PROMPTS if prompt is None else prompt, **{**CALL, **options})
            return {"latents": np.asarray(out.images)}

        return run

    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    for family in ("sd", "xl"):
        for sampler in SAMPLERS:
            yield f"{family} sampler {sampler}", call(family, sampler=sampler)
        for rule in RULES:
            sampler = "ddim" if "cfg-pp" in rule or family == "sd" else "euler"
            scale = 0.6 if rule == "cfg-pp" else 4.0
            options = {"guidance": rule, "sampler": sampler, "guidance_scale": scale}
            yield f"{family} rule {rule}", call(family, **options)
        yield f"{family} scales", call(family, guidance_scale=[1.0, 6.0])
        yield f"{family} negative", call(family, negative_prompt="a blue star")
        yield f"{family} and", call(family, ["a red circle AND a star", "a ring"])
        yield f"{family} image", call(family, image=[image] * 2, strength=0.6)
        yield f"{family} mask", call(family, image=[image] * 2, mask=[mask] * 2, strength=0.9)
        yield f"{family} part", call(family, denoising_end=0.5)
        for spacing in ("leading", "trailing", "linspace", "karras", "exponential"):
            yield f"{family} spacing {spacing}", call(family, timesteps=spacing, sampler="euler")
    words = ["a small red circle", "a blue square above a red star"]
    yield "embedded", call("embedded", words)
    yield "embedded classifier", call("embedded", words, classifier_scale=2.0)
    yield "embedded clip", call("embedded", words, clip_scale=50.0)
    yield "embedded pixels", call("embedded", words, output="numpy")


def tensors(folder: pathlib.Path) -> Arrays:
    """All weights in the files of a folder, by file and name."""
    from safetensors.numpy import load_file

    return {
        f"{file.relative_to(folder)}:{name}": array
        for file in sorted(folder.rglob("*.safetensors"))
        for name, array in load_file(file).items()
    }


def trainings(work: pathlib.Path, models: pathlib.Path) -> Iterator[Case]:
    """Three steps of a training of each kind: the exported weights."""

    def train(kind: str) -> Callable[[], Arrays]:
        def run() -> Arrays:
            text = TRAIN.replace("KIND", kind)
            config = work / f"{kind}.py"
            config.write_text(text.replace("WORK", str(work)).replace("MODELS", str(models)))
            command("train.py", str(config), "--workdir", str(work / kind))
            return tensors(work / kind / "export")

        return run

    for kind in TRAININGS:
        yield f"train {kind}", train(kind)


def conversions(work: pathlib.Path, models: pathlib.Path) -> Iterator[Case]:
    """Folders of both families to a single file, to Flax, and back: the bytes of the weights."""

    def convert(*arguments: str) -> Callable[[], Arrays]:
        def run() -> Arrays:
            output = pathlib.Path(arguments[1])
            command("-m", "jaxdiff", "convert", *arguments)
            files = sorted(output.rglob("*")) if output.is_dir() else [output]
            return {
                str(file.relative_to(work)): np.frombuffer(file.read_bytes(), np.uint8)
                for file in files
                if file.suffix in (".safetensors", ".msgpack", ".json")
            }

        return run

    # a single file has the names of published models, so its model has their stages
    embedded = "jaxdiff/assets/scenes"
    yield "convert to flax", convert(embedded, str(work / "flax"), "--format", "flax")
    yield "convert from flax", convert(str(work / "flax"), str(work / "folder"))
    for family in ("sd", "xl"):
        yield f"convert {family}", convert(str(models / family), str(work / family))


def command(*arguments: str) -> None:
    """Run Python with the package of this folder; its output shows where it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr}")


def record(models: pathlib.Path, output: pathlib.Path, only: str) -> None:
    """Run the cases and write what each gives."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    models, output = models.resolve(), output.resolve()
    make_models(models)
    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    cases = [*calls(models), *trainings(work, models), *conversions(work, models)]
    for name, run in cases:
        if only in name:
            np.savez(output / f"{name.replace('/', '-')}.npz", **run())  # type: ignore
            print(name, flush=True)


def difference(ours: Arrays, theirs: Arrays) -> float:
    """The largest absolute difference; infinite for other names, shapes or dtypes."""
    if set(ours) != set(theirs):
        return float("inf")
    worst = 0.0
    for name, a in ours.items():
        b = theirs[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if not np.array_equal(a, b):
            worst = max(worst, float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()))
    return worst


def compare(before: pathlib.Path, after: pathlib.Path, tolerance: float) -> bool:
    """Print a line for each case; whether all are within `tolerance`."""
    names = sorted({path.name for folder in (before, after) for path in folder.glob("*.npz")})
    good = bool(names)
    for name in names:
        if not ((before / name).exists() and (after / name).exists()):
            print(f"{name}: on one side only")
            good = False
            continue
        found = difference(dict(np.load(before / name)), dict(np.load(after / name)))
        good &= found <= tolerance
        print(f"{pathlib.Path(name).stem:<50} {found:g}")
    return good


def main() -> None:
    """Run or compare."""
    options = parsed()
    first, second = options.folders
    if options.compare:
        raise SystemExit(0 if compare(first, second, options.tolerance) else 1)
    record(first, second, options.only)


if __name__ == "__main__":
    main()
