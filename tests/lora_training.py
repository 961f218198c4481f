"""Two steps of LoRA on a model's cached latents: what is exported, and that it has an effect."""

import numpy as np
import tiny
from captioned_images import write_folder

import jaxdiff
from jaxdiff.checkpoints.safetensors import read_table
from jaxdiff.cli import main
from jaxdiff.cli.train import run
from jaxdiff.experiments.training_methods import LORA

CONFIG = """
from jaxdiff.training.config import *
objective = DiffusionObjective(pipeline="MODEL", trainable=LoRA(rank=3, alpha=6.0),
    caption_dropout=0.5)
config = TrainConfig(objective=objective, steps=2, batch_size=8, sample_every=0, log_every=1,
    data=DataConfig(kind="latents", path="LATENTS", validation_size=2),
    optimiser=OptimiserConfig(learning_rate=0.3, warmup_steps=1, decay_fraction=0))
"""
STREAMS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
SINGLE = ("attn.to_q", "attn.to_k", "attn.to_v")


def train(model, folder):
    """Train on latents and text states of random pictures in `folder`; returns the file."""
    write_folder(folder / "pictures", 16, sizes=((16, 16),))
    cached = [str(model), str(folder / "latents"), "--resolution", "16", "--bucket-multiple", "16"]
    cached += ["--kind", "folder", "--path", str(folder / "pictures"), "--dtype", "float32"]
    cached += ["--shard-size", "8", "--texts", "embeddings"]
    assert main.run("cache-latents", cached) == 0
    text = CONFIG.replace("MODEL", str(model)).replace("LATENTS", str(folder / "latents"))
    (folder / "config.py").write_text(text)
    run([str(folder / "config.py"), "--workdir", str(folder / "work")])
    return folder / "work" / "export" / LORA


def modules(file):
    """The modules of the transformer that a file in the spelling of diffusers changes."""
    names = (name.removeprefix("transformer.") for name in read_table(file))
    return {name.rpartition(".lora_")[0] for name in names}


def attention(blocks, single_blocks=0, *, last_context=True):
    """The projections of attention; those of the text in the last block may have no output."""
    names = {f"transformer_blocks.{i}.attn.{n}" for i in range(blocks) for n in STREAMS}
    outputs = blocks if last_context else blocks - 1
    names |= {f"transformer_blocks.{i}.attn.to_add_out" for i in range(outputs)}
    single = range(single_blocks)
    return names | {f"single_transformer_blocks.{i}.{name}" for i in single for name in SINGLE}


def check_effect(model, file):
    """Fail unless the file changes images, and leaves no trace when it is taken off."""
    pipe = tiny.first_devices(jaxdiff.load(model, dtype="float32"), 1)
    call = {"steps": 2, "seed": 0, "output": "latent", "height": 16, "width": 16}
    before = pipe("a small red circle", **call).images
    pipe.load_lora(file)
    assert np.abs(pipe("a small red circle", **call).images - before).max() > 1e-3
    pipe.unload_loras()
    np.testing.assert_array_equal(pipe("a small red circle", **call).images, before)
