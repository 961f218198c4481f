"""What a network learns to predict, and which network: noise, v or velocity x UNet or transformer.

    export XLA_FLAGS=--xla_force_host_platform_device_count=2
    python -m jaxdiff cache-latents jaxdiff/assets/scenes runs/scenes_latents --kind scenes \
        --resolution 128 --num-scenes 65536 --batch-size 32 --shard-size 4096 --texts embeddings
    PYTHONPATH=. python benchmarks/objectives.py --workdir runs/objectives
    PYTHONPATH=. python benchmarks/objectives.py --workdir runs/objectives --speed
    PYTHONPATH=. python benchmarks/objectives.py --workdir runs/objectives --table

Each pair is trained with several seeds, on the same latents, captions and hidden states and with
the same optimiser, steps and batch size; then generates every second standard prompt of the scenes
at guidance scale 3 in 25 steps of dpmpp-2m. The UNet is the embedded model's with 96 channels in
place of 128, the transformer (PixArt's, 2310.00426) has as many parameters and sees every latent
pixel. The same command resumes, and trains nothing again that is finished. `--speed` measures, on
an idle machine, how many images a second each network generates in batches of 64, and trains on.
`--table` prints what is there as Markdown: means over seeds with the standard error of the mean.
Losses of different objectives measure different things: compare those of one objective only.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import shutil
import time
from typing import cast

import numpy as np

import jaxdiff
from jaxdiff.cli.evaluate import run as evaluate
from jaxdiff.cli.train import load_config
from jaxdiff.diffusion.schedules import FlowSchedule, VPSchedule
from jaxdiff.experiments.train import train
from jaxdiff.models.pixart.config import PixArtTransformer2DConfig
from jaxdiff.training.config import DiffusionObjective, EMAConfig, TrainConfig

BATCH = 64  # images that are generated together
UNET = load_config(pathlib.Path(__file__).parents[1] / "configs/scenes_unet.py")
OBJECTIVE = cast(DiffusionObjective, UNET.objective)
VP = VPSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
FLOW = FlowSchedule(time_scale=1000.0)
OBJECTIVES = {
    "noise": {"schedule": VP, "prediction_type": "epsilon"},
    "v": {"schedule": VP, "prediction_type": "v_prediction"},
    "velocity": {"schedule": FLOW, "prediction_type": "flow_prediction"},
}
NETWORKS = {
    "UNet": dataclasses.replace(OBJECTIVE.model, block_out_channels=(96, 96)),
    "transformer": PixArtTransformer2DConfig(
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        num_layers=7,
        cross_attention_dim=160,
        caption_channels=128,
        sample_size=8,
        patch_size=1,
    ),
}
ACCURACIES = {
    "relation": "relation",
    "shape": "shape",
    "one object": "one object correct",
    "two objects": "two objects correct",
}
LOSS = "validation loss"
GENERATES, TRAINS = "images/s generated", "images/s trained"


def config(network: str, objective: str, seed: int, options: argparse.Namespace) -> TrainConfig:
    """The training of one pair with one seed."""
    return dataclasses.replace(
        UNET,
        objective=dataclasses.replace(
            OBJECTIVE,
            vae=f"{options.model}/vae",
            text_encoder=str(options.model),
            model=NETWORKS[network],
            **OBJECTIVES[objective],
        ),
        data=dataclasses.replace(UNET.data, path=str(options.latents), seed=seed),
        optimiser=dataclasses.replace(UNET.optimiser, warmup_steps=50),
        seed=seed,
        steps=options.steps,
        batch_size=options.batch_size,
        ema=EMAConfig(decay=0.99),
        log_every=50,
        checkpoint_every=100,
        sample_every=options.steps,
    )


def measure(workdir: pathlib.Path, config: TrainConfig) -> dict[str, float]:
    """Train in `workdir` and evaluate the export."""
    trained = train(config, workdir)
    report = workdir / "evaluation.json"
    call = ["--guidance-scale", "3", "--steps", "25", "--sampler", "dpmpp-2m"]
    call += ["--prompt-stride", "2", "--output", str(report)]
    evaluate(["--model", str(trained.export), *call])
    found = json.loads(report.read_text())["accuracies"]
    losses = [value for name, value in logged(workdir) if name.startswith("validation_loss_q")]
    return {name: found[key]["value"] for name, key in ACCURACIES.items()} | {
        LOSS: float(np.mean(losses[-4:]))
    }


def speeds(export: pathlib.Path, training: TrainConfig, workdir: pathlib.Path) -> dict[str, float]:
    """Images a second that a network generates with guidance, and trains on: the best of three."""
    pipe = jaxdiff.load(export)
    seconds = []
    for first in range(0, 4 * BATCH, BATCH):  # the first batch compiles
        started = time.perf_counter()
        pipe(
            "a small red circle",
            seed=list(range(first, first + BATCH)),
            guidance_scale=3.0,
            steps=25,
            sampler="dpmpp-2m",
            output="numpy",
        )
        seconds.append(time.perf_counter() - started)
    shutil.rmtree(workdir, ignore_errors=True)
    short = dataclasses.replace(
        training, steps=80, log_every=20, sample_every=0, checkpoint_every=80
    )
    train(short, workdir)
    trained = [value for name, value in logged(workdir) if name == "images_per_s"]
    return {GENERATES: BATCH / min(seconds[1:]), TRAINS: max(trained)}


def logged(workdir: pathlib.Path) -> list[tuple[str, float]]:
    """All values of the log of a training, in order."""
    lines = (workdir / "log.jsonl").read_text().splitlines()
    return [item for line in lines for item in json.loads(line).items()]


def table(
    results: dict[tuple[str, str], list[dict[str, float]]], speed: dict[str, dict[str, float]]
) -> str:
    """The Markdown table of all pairs; `speed` is of each network."""
    columns, rates = [*ACCURACIES, LOSS], [GENERATES, TRAINS] if speed else []
    rows = [f"| predicts | network | seeds | {' | '.join([*columns, *rates])} |"]
    rows.append("|---" * (3 + len(columns) + len(rates)) + "|")
    for (objective, network), runs in results.items():
        means = []
        for column in columns:
            values = [run[column] for run in runs]
            error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.nan
            means.append(f"{np.mean(values):.3f} ± {error:.3f}")
        means += [f"{speed[network][rate]:.1f}" for rate in rates]
        rows.append(f"| {objective} | {network} | {len(runs)} | {' | '.join(means)} |")
    return "\n".join(rows)


def main() -> None:
    """Train and evaluate what is missing, seed by seed; then print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--latents", type=pathlib.Path, default="runs/scenes_latents")
    parser.add_argument("--model", type=pathlib.Path, default="jaxdiff/assets/scenes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--speed", action="store_true", help="only measure speed")
    options = parser.parse_args()
    rates = options.workdir / "speed.json"
    if options.speed:
        found = {}
        for network in NETWORKS:
            training = config(network, "velocity", 0, options)
            export = options.workdir / f"velocity-{network}-0/export"
            found[network] = speeds(export, training, options.workdir / "speed")
        rates.write_text(json.dumps(found))
        return
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for objective in OBJECTIVES:
            for network in NETWORKS:
                workdir = options.workdir / f"{objective}-{network}-{seed}"
                file = workdir / "result.json"
                if not file.exists() and not options.table:
                    result = measure(workdir, config(network, objective, seed, options))
                    file.write_text(json.dumps(result))
                if file.exists():
                    found = json.loads(file.read_text())
                    results.setdefault((objective, network), []).append(found)
    print(table(results, json.loads(rates.read_text()) if rates.exists() else {}))


if __name__ == "__main__":
    main()
