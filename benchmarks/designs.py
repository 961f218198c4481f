"""What the designs of docs/designs.md cost, what they get right, and their pictures.

    python benchmarks/designs.py classes runs/scenes_classes_images
    PYTHONPATH=. python benchmarks/designs.py cost
    PYTHONPATH=. python benchmarks/designs.py score --workdir runs --output runs/designs.json
    PYTHONPATH=. python benchmarks/designs.py speed --workdir runs
    PYTHONPATH=. python benchmarks/designs.py grid --workdir runs --output docs/designs.png

`classes` draws single objects into a folder, captioned by colour and shape, for
configs/scenes_classes.py. `cost` prints the parameters and the operations of each training as its
config defines them: of matrix products and convolutions, a multiply-add counting as two. `score`
generates the standard prompts of the scenes (every fourth), and for classes one object of each
class eight times, and counts what the judge finds right. `speed` measures seconds an image in
batches of 16 on an idle machine. Trained models are read from WORKDIR/CONFIG/export.
"""

import argparse
import json
import pathlib
import textwrap
import time
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image

import jaxdiff
from jaxdiff.cli.train import load_config
from jaxdiff.evaluation.alignment import evaluate_alignment, model_generator
from jaxdiff.evaluation.image_grid import labelled_grid
from jaxdiff.experiments.experiment import FILES
from jaxdiff.experiments.procedural import EMBEDDED_DATA, procedural_dataset
from jaxdiff.experiments.train import wire
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.planning.training import step_flops
from jaxdiff.scenes.rendering import NUM_LAYOUT_UNIFORMS, layout_objects, render
from jaxdiff.scenes.source import sample_scene

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
STRIDE, PER_CLASS, BATCH = 4, 8, 16
SAMPLING = {"sampler": "dpmpp-2m", "steps": 25}
CLASSES = "classes"


class Design(NamedTuple):
    """The models of a design in the order in which they run, and the options of the stages."""

    configs: tuple[str, ...]
    guidance_scale: float
    stages: tuple[dict[str, Any], ...] = ()


DESIGNS = {
    "latent": Design(("scenes_unet",), 3.0),
    "cascade of pixels": Design(
        ("scenes_cascade_base", "scenes_cascade_64", "scenes_cascade_128"),
        3.0,
        ({"steps": 10}, {"steps": 10}),
    ),
    "prior and decoder": Design(("scenes_prior", "scenes_embedding_decoder"), 1.0),
    CLASSES: Design(("scenes_classes",), 3.0),
}
VAE = ("scenes_vae", "scenes_decoder")  # of all but the cascade
PROMPTS = (
    "a large red star on a white background",
    "a small green circle on a grey background",
    "a large blue ring on a pink background",
    "a small yellow square above a large purple cross",
    "a large orange triangle left of a small black circle",
    "a small cyan star right of a large red square",
)


def load(design: Design, workdir: pathlib.Path) -> Any:
    """The trained model, or cascade of models."""
    pipes = [jaxdiff.load(str(workdir / name / "export")) for name in design.configs]
    return jaxdiff.Cascade(*pipes) if len(pipes) > 1 else pipes[0]


def draw_classes(folder: pathlib.Path, count: int) -> None:
    """`count` images of single objects, and metadata.jsonl with their classes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(0), []
    for i in range(count):
        scene = sample_scene(rng, "train", 1)
        layout = layout_objects(scene, rng.random(NUM_LAYOUT_UNIFORMS))
        (drawn,) = scene.objects
        name = f"{i:05}.png"
        Image.fromarray(render(scene, layout)).save(folder / name)
        lines.append({"file_name": name, "text": class_of(drawn.colour, drawn.shape)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def class_of(colour: str, shape: str) -> str:
    """The name of a class."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def print_costs() -> None:
    """Parameters, and operations of each training."""
    print("| design | config | parameters | steps x images | operations |\n|---|---|---|---|---|")
    every = {name: design.configs for name, design in DESIGNS.items()} | {"VAE": VAE}
    for name, configs in every.items():
        for each in configs:
            config = load_config(CONFIGS / f"{each}.py")
            training = wire(config, FILES)
            parameters = sum(leaf.size for leaf in training.task.shapes.values())
            total = config.steps * step_flops(training, config.batch_size)
            print(
                f"| {name} | {each} | {parameters / 1e6:.2f} M | "
                f"{config.steps} x {config.batch_size} | {total:.2e} |",
                flush=True,
            )


def options_of(model: Any, design: Design) -> dict[str, Any]:
    """The options of a call."""
    stages = {} if isinstance(model, Pipeline) else {"stage_options": list(design.stages)}
    return {"guidance_scale": design.guidance_scale, **SAMPLING, **stages}


def score(names: list[str], workdir: pathlib.Path, output: pathlib.Path) -> None:
    """The judge's shares of each design, added to the JSON object in `output`."""
    judge = procedural_dataset(EMBEDDED_DATA)
    found = json.loads(output.read_text()) if output.exists() else {}
    for name in names:
        design, model = DESIGNS[name], load(DESIGNS[name], workdir)
        prompts = judge.standard_prompts()[::STRIDE]
        if name == CLASSES:
            classes = cast(Any, load_config(CONFIGS / "scenes_classes.py").objective).class_names
            prompts = [judge.parse_prompt(text) for text in classes] * PER_CLASS
        last = model if isinstance(model, Pipeline) else model.pipes[-1]
        generate = model_generator(
            model, judge, batch_size=BATCH, last=last, **options_of(model, design)
        )
        report = evaluate_alignment(generate, judge, prompts, seed=0, batch_size=BATCH)
        print(f"{name}\n{report.table()}", flush=True)
        found[name] = report.to_mapping()
        output.write_text(json.dumps(found, indent=2) + "\n")


def print_speeds(names: list[str], workdir: pathlib.Path) -> None:
    """Seconds an image of each design, best of three batches after one that compiles."""
    for name in names:
        design, model = DESIGNS[name], load(DESIGNS[name], workdir)
        prompts = [shown(name, prompt) for prompt in PROMPTS][:1] * BATCH
        seconds = []
        for seed in range(4):
            begin = time.perf_counter()
            model(prompts, seed=seed * BATCH, **options_of(model, design))
            seconds.append(time.perf_counter() - begin)
        print(f"{name}: {min(seconds[1:]) / BATCH:.3f} s an image", flush=True)


def shown(name: str, prompt: str) -> str:
    """What a design can be told of a prompt: one of classes, its first object's class."""
    if name != CLASSES:
        return prompt
    parsed: Any = procedural_dataset(EMBEDDED_DATA).parse_prompt(prompt)
    (first, *_) = parsed.scene.objects
    return class_of(first.colour, first.shape)


def draw_grid(names: list[str], workdir: pathlib.Path, output: pathlib.Path) -> None:
    """The same prompts by each design; a cascade also after each of its stages."""
    rows, labels = [], []
    for name in names:
        design, model = DESIGNS[name], load(DESIGNS[name], workdir)
        prompts = [shown(name, prompt) for prompt in PROMPTS]
        models = [(name, model)]
        if name == "cascade of pixels":
            first, second = model.pipes[:2]
            models = [
                ("its base, 32 pixels", first),
                ("after 64 pixels", jaxdiff.Cascade(first, second)),
                (name, model),
            ]
        for label, each in models:
            options = options_of(each, design)
            if "stage_options" in options:
                options["stage_options"] = options["stage_options"][: len(each.stages)]
            images = each(prompts, seed=0, **options).images
            rows.append([np.asarray(image.resize((128, 128), 0)) for image in images])
            labels.append(label)
    columns = [textwrap.fill(prompt, 28) for prompt in PROMPTS]
    labelled_grid(rows, labels, columns).save(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    classes = commands.add_parser("classes")
    classes.add_argument("folder", type=pathlib.Path)
    classes.add_argument("--count", type=int, default=8192)
    commands.add_parser("cost")
    for command, output in (("score", "runs/designs.json"), ("speed", None), ("grid", None)):
        sub = commands.add_parser(command)
        sub.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs"))
        sub.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS))
        if command != "speed":
            sub.add_argument("--output", type=pathlib.Path, default=output, required=not output)
    options = parser.parse_args()
    if options.command == "classes":
        draw_classes(options.folder, options.count)
    elif options.command == "cost":
        print_costs()
    elif options.command == "score":
        score(options.designs, options.workdir, pathlib.Path(options.output))
    elif options.command == "speed":
        print_speeds(options.designs, options.workdir)
    else:
        draw_grid(options.designs, options.workdir, options.output)


if __name__ == "__main__":
    main()
