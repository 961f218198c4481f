"""How fast Stable Diffusion 1.5 in float16 gets from disk into arrays, and in how much memory.

    PYTHONPATH=. python benchmarks/load.py [--folder F] [--python PYTHON_WITH_DIFFUSERS]

Writes a folder with random weights of the published shapes (2 GB) where there is none, then loads
it three times in processes of their own, from the page cache. Seconds are those of `jaxdiff.load`'s
reading (`read_pipeline`), without imports; memory is the process's peak beyond its peak before.
With --python also PyTorch diffusers' `from_pretrained`, in turn with ours.
"""

import argparse
import json
import pathlib
import subprocess
import sys

RUNS = 3

OURS = """
import json, pathlib, re, sys, time
import jax
jax.numpy.zeros(8).block_until_ready()
from jaxdiff.checkpoints.pipelines import read_pipeline
from jaxdiff.core.types import dtype_of
from jaxdiff.models.build import param_dict
def resident():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
before = resident()
start = time.perf_counter()
parts = read_pipeline(sys.argv[1], dtype_of(sys.argv[2]))
seconds = time.perf_counter() - start
arrays = [a for c in parts.components.values() for a in param_dict(c.module).values()]
size = sum(a.nbytes for a in arrays)
peak = resident() - before
print(json.dumps([seconds, peak * 1024, size]))
"""

THEIRS = """
import json, pathlib, re, sys, time
import torch, diffusers, transformers
diffusers.utils.logging.disable_progress_bar()
def resident():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
before = resident()
start = time.perf_counter()
pipe = diffusers.StableDiffusionPipeline.from_pretrained(
    sys.argv[1], dtype=getattr(torch, sys.argv[2]), safety_checker=None
)
# Its tensors are views of the file until they are read.
total = sum(float(p.flatten()[:: 512].sum()) for m in (pipe.unet, pipe.vae, pipe.text_encoder)
            for p in m.parameters())
seconds = time.perf_counter() - start
size = sum(p.nbytes for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters())
peak = resident() - before
print(json.dumps([seconds, peak * 1024, size]))
"""


def write(folder: pathlib.Path) -> None:
    """A folder with random float16 weights."""
    import jax.numpy as jnp
    import numpy as np

    from jaxdiff.checkpoints.clip_vocabulary import clip_tokenizer
    from jaxdiff.checkpoints.components import Component
    from jaxdiff.checkpoints.layout_stable_diffusion import SD1
    from jaxdiff.checkpoints.pipelines import PipelineComponents, write_pipeline
    from jaxdiff.models.build import param_dict, with_params
    from jaxdiff.models.presets import preset

    rng = np.random.default_rng(0)
    noise = rng.normal(size=1 << 24).astype(np.float16)

    def filled(kind: str, name: str) -> Component:
        module = preset(kind, name).abstract(dtype=jnp.float16, param_dtype=jnp.float16)
        arrays = {
            path: jnp.asarray(np.resize(noise, leaf.shape))
            for path, leaf in param_dict(module).items()
        }
        return Component(module=with_params(module, arrays))

    parts = PipelineComponents(
        components={
            "unet": filled("unet", "sd15"),
            "vae": filled("vae", "sd"),
            "text_encoder": filled("text", "clip-l"),
        },
        scheduler=SD1.scheduler,
        tokenizers={"tokenizer": clip_tokenizer("<|endoftext|>")},
    )
    write_pipeline(folder, parts)


def measure(python: str, program: str, folder: pathlib.Path, dtype: str) -> list[float]:
    """Seconds, peak bytes and bytes of weights of one load."""
    command = [python, "-W", "ignore", "-c", program, str(folder), dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Write, warm the page cache, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/sd15-random"))
    parser.add_argument("--python", help="an interpreter that has torch and diffusers")
    parser.add_argument("--dtype", default="float16")
    options = parser.parse_args()
    if not options.folder.exists():
        write(options.folder)
    for path in options.folder.rglob("*"):
        if path.is_file():
            path.read_bytes()
    programs = {"jaxdiff": (sys.executable, OURS)}
    if options.python:
        programs["diffusers"] = (options.python, THEIRS)
    results: dict[str, list[list[float]]] = {name: [] for name in programs}
    for _ in range(RUNS):
        for name, (python, program) in programs.items():
            results[name].append(measure(python, program, options.folder, options.dtype))
    for name, runs in results.items():
        seconds, peak, size = min(runs)
        print(
            f"{name:10s} {seconds:5.2f} s  {size / seconds / 1e9:5.2f} GB/s  "
            f"peak {peak / size:4.2f} x the weights' {size / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
