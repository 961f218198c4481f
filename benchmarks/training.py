"""How fast the step of a training is: its time, pictures per second, and the share of the peak.

    PYTHONPATH=. python benchmarks/training.py configs/scenes_unet.py \
        --vae jaxdiff/assets/scenes/vae --text-encoder jaxdiff/assets/scenes
    XLA_CLIENT_MEM_FRACTION=.95 PYTHONPATH=. python benchmarks/training.py configs/sd15.py \
        --batch-size 128 --fsdp 1 --trace trace        # an H200

The step is the one that train.py runs, on a batch of noise that lies on the devices; weights are
drawn at random, those of frozen networks too, so nothing is read. Steps follow each other without
waiting, as in a training. MFU is the FLOPs of the model (jaxdiff/profiling/flops.py: not what is
computed again) over time and peak. The peak is that of jaxdiff/parallel/hardware.py or, if a device
is not in it, what its best product of two matrices reaches. `--trace FOLDER` writes a profile of
one step for TensorBoard or Perfetto and, of an NVIDIA GPU, tells the milliseconds of each kind of
kernel. Prints one JSON object.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData

from jaxdiff.cli.train import load_config
from jaxdiff.core.types import PyTree, dtype_of
from jaxdiff.experiments.train import wire
from jaxdiff.parallel.chips import peak_flops
from jaxdiff.parallel.mesh import device_put_global, make_mesh, replicated, shard_batch
from jaxdiff.planning.published_models import PUBLISHED
from jaxdiff.planning.training import step_flops
from jaxdiff.training.config import DiffusionObjective, TrainConfig

# Kinds of an NVIDIA GPU's kernels by their names, the first that is found.
KERNELS = {
    "attention": "sdpa|flash|compute_dot_do_o|convert_dq",
    "convolutions": "xmma|implicit_gemm|conv2d",
    "matrices": "nvjet|gemm|cutlass|splitK",
    "turning and copying": "transpose|memcpy|memset|copy",
    "the rest": "",
}
SIZES = (512, 1024, 2048)  # of the matrices that find the peak of others
ROUNDS = 5
QUEUED = 4  # steps between two looks at the clock


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=pathlib.Path)
    parser.add_argument("--vae")
    parser.add_argument("--text-encoder")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--fsdp", type=int)
    parser.add_argument("--remat")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of {QUEUED} steps each")
    parser.add_argument("--trace", type=pathlib.Path)
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> TrainConfig:
    """The config with what the command line says; latents are taken as cached."""
    config = load_config(options.config)
    objective, fields = config.objective, ("vae", "text_encoder", "remat")
    named = {name: getattr(options, name) for name in fields if getattr(options, name)}
    if isinstance(objective, DiffusionObjective):
        data = dataclasses.replace(config.data, kind="latents", path="")
        objective = dataclasses.replace(objective, **named)
        config = dataclasses.replace(config, objective=objective, data=data)
    overrides = {name: getattr(options, name) for name in ("batch_size", "dtype")}
    config = dataclasses.replace(config, **{n: v for n, v in overrides.items() if v is not None})
    if options.fsdp is not None:
        config = dataclasses.replace(
            config, mesh=dataclasses.replace(config.mesh, fsdp=options.fsdp)
        )
    return config


def random(shapes: PyTree, seed: int = 0) -> PyTree:
    """Small random numbers of these shapes; of integers, those that are tokens anywhere."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return rng.integers(1, 256, leaf.shape).astype(leaf.dtype)
        return (0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

    return jax.tree.map(draw, shapes)


def peak(dtype: Any) -> tuple[float, str]:
    """FLOP/s of all devices, and where that is from."""
    known = peak_flops()
    if known is not None:
        return known, "jaxdiff/parallel/hardware.py"
    best = 0.0
    for n in SIZES:
        a = jnp.ones((n, n), dtype)
        product = jax.jit(jnp.matmul)
        product(a, a).block_until_ready()
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            product(a, a).block_until_ready()
            best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best, "product of matrices"


def kernels(folder: pathlib.Path) -> dict[str, float]:
    """Milliseconds of each kind of kernel in the profile in `folder`; none of other devices."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    found: collections.Counter[str] = collections.Counter()
    for plane in ProfileData.from_file(str(newest)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            for event in line.events if line.name.startswith("Stream") else ():
                kind = next(k for k, names in KERNELS.items() if re.search(names, event.name, re.I))
                found[kind] += event.duration_ns / 1e6
    return dict(found.most_common())


def main() -> None:
    options = parsed()
    config = chosen(options)
    parts = wire(config, PUBLISHED)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    program = parts.program(config, mesh)
    state = program.init(config.seed)
    frozen = jax.tree.map(device_put_global, random(parts.frozen), program.frozen_shardings)
    batch = shard_batch(random(parts.batch(config.batch_size), 1), mesh)
    base = jax.device_put(jax.random.key(0), replicated(mesh))
    begin = time.perf_counter()
    step = program.step.lower(state, frozen, batch, base).compile()
    compiling = time.perf_counter() - begin
    times = []
    for _ in range(options.rounds + 1):  # the first warms up
        begin = time.perf_counter()
        for _ in range(QUEUED):
            state, metrics = step(state, frozen, batch, base)
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - begin) / QUEUED)
    seconds = float(np.median(times[1:]))
    flops, (most, source) = step_flops(parts, config.batch_size), peak(dtype_of(config.dtype))
    found = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "parameters": sum(leaf.size for leaf in parts.task.shapes.values()),
        "compile_s": compiling,
        "step_ms": 1e3 * seconds,
        "images_per_s": config.batch_size / seconds,
        "flops_per_step": flops,
        "flops_per_s": flops / seconds,
        "peak_flops_per_s": most,
        "peak_from": source,
        "mfu": flops / seconds / most,
        "loss": float(metrics["loss"]),
    }
    if options.trace is not None:
        with jax.profiler.trace(str(options.trace)):
            jax.block_until_ready(step(state, frozen, batch, base))
        found["kernels_ms"] = kernels(options.trace)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
