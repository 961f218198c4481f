"""Published networks at full size against PyTorch: one forward each, float32, random weights.

    make parity-full        # all of them: up to 6 GB of disk and 16 GB of memory at once

PyTorch makes random weights of the published shapes, writes them as float16 and runs; a process of
its own then reads the folder here and runs the same input. The relative error is max |a - b| /
max |b| over all outputs. Exits with 1 where one is above LIMIT.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

LIMIT = 1e-4
NAMES = (
    "unet sd15",
    "unet sd21",
    "unet sdxl-base",
    "unet sdxl-refiner",
    "vae sd",
    "vae sdxl",
    "text clip-l",
    "text openclip-h",
    "text openclip-bigg",
)
SIDE = 32  # latents along a side for UNets
TOKENS = 77


def inputs(kind: str, config: dict) -> dict[str, np.ndarray]:
    """The inputs of a network, in our layout."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    if kind == "text":
        ids = rng.integers(5, 49000, (1, TOKENS)).astype(np.int32)
        ids[0, 0], ids[0, 40:] = 49406, 49407
        return {"ids": ids}
    if kind == "vae":
        return {"z": normal(1, 16, 16, 4), "pixels": np.tanh(normal(1, 64, 64, 3))}
    found = {"x": normal(1, SIDE, SIDE, 4), "t": np.array([601], np.int32)}
    found["context"] = normal(1, TOKENS, config["cross_attention_dim"])
    if config["addition_embed_type"]:
        pooled = 1280
        count = (config["projection_class_embeddings_input_dim"] - pooled) // 256
        found["text_embeds"] = normal(1, pooled)
        found["time_ids"] = np.array([[1024, 1024, 0, 0, 1024, 1024][:count]], np.float32)
    return found


def theirs(kind: str, name: str, folder: pathlib.Path) -> None:
    """Write a random network of PyTorch into `folder`, with its inputs and outputs."""
    import diffusers
    import torch
    import transformers

    from jaxdiff.core.configs import to_mapping
    from jaxdiff.models.presets import preset

    torch.manual_seed(0)
    chosen = preset(kind, name)
    config = to_mapping(chosen.config)
    with torch.device("meta"):
        if kind == "unet":
            model = diffusers.UNet2DConditionModel(**config)
        elif kind == "vae":
            model = diffusers.AutoencoderKL(**config)
        else:
            projects = chosen.options.get("with_projection", False)
            cls = (
                transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
            )
            model = cls(transformers.CLIPTextConfig(**config))
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
            if parameter.ndim > 1:
                parameter.mul_(parameter[0].numel() ** -0.5)
            else:
                parameter.mul_(0.1).add_(1.0)
            parameter.copy_(parameter.half())  # what is stored is what runs
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1])[None])
    given = inputs(kind, config)
    np.savez(folder / "inputs.npz", **given)
    with torch.no_grad():
        outputs = _run_torch(torch, kind, model, given)
    np.savez(folder / "theirs.npz", **{k: v.numpy() for k, v in outputs.items()})
    model.half().save_pretrained(folder)


def _run_torch(torch, kind, model, given):
    def nchw(x):
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

    def nhwc(x):
        return x.permute(0, 2, 3, 1)

    if kind == "text":
        out = model(torch.from_numpy(given["ids"]).long(), output_hidden_states=True)
        pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
        return {
            "last": out.last_hidden_state,
            "penultimate": out.hidden_states[-2],
            "pooled": pooled,
        }
    if kind == "vae":
        moments = model.encode(nchw(given["pixels"])).latent_dist
        decoded = model.decode(nchw(given["z"])).sample
        return {"mean": nhwc(moments.mean), "decoded": nhwc(decoded)}
    added = {k: torch.from_numpy(given[k]) for k in ("text_embeds", "time_ids") if k in given}
    t, context = torch.from_numpy(given["t"]), torch.from_numpy(given["context"])
    out = model(nchw(given["x"]), t, context, added_cond_kwargs=added).sample
    return {"out": nhwc(out)}


def ours(kind: str, folder: pathlib.Path) -> float:
    """The relative error of this project's network in `folder`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxdiff.checkpoints.components import read_component

    module = read_component(folder, dtype=jnp.float32).module
    graph, params = nnx.split(module)
    given = {k: jnp.asarray(v) for k, v in np.load(folder / "inputs.npz").items()}
    reference = dict(np.load(folder / "theirs.npz"))

    def run(params, given):
        model: Any = nnx.merge(graph, params)
        if kind == "text":
            return model.features(given["ids"])._asdict()
        if kind == "vae":
            return {
                "mean": model.encode(given["pixels"])[0],
                "decoded": model.decode(given["z"]),
            }
        more = {k: given[k] for k in ("text_embeds", "time_ids") if k in given}
        return {"out": model(given["x"], given["t"], given["context"], **more)}

    got = jax.jit(run)(params, given)
    errors = [
        float(np.abs(np.asarray(got[k]) - v).max() / np.abs(v).max()) for k, v in reference.items()
    ]
    return max(errors)


def main() -> None:
    """Run one side, or all networks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=NAMES, help="such as 'unet sd15'")
    parser.add_argument("--side", choices=("theirs", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        kind, name = options.only[0].split()
        if options.side == "theirs":
            theirs(kind, name, options.folder)
        else:
            print(ours(kind, options.folder))
        return
    print("| network | relative error | seconds |\n|---|---|---|", flush=True)
    failed = False
    for name in options.only:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            common = [sys.executable, __file__, "--only", name, "--folder", folder, "--side"]
            quiet = os.environ | {"TQDM_DISABLE": "1"}
            subprocess.run([*common, "theirs"], check=True, env=quiet)
            result = subprocess.run([*common, "ours"], check=True, capture_output=True, text=True)
        error = float(result.stdout.split()[-1])
        failed |= not error < LIMIT
        print(f"| {name} | {error:.1e} | {time.perf_counter() - started:.0f} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
