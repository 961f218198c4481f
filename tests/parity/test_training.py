"""Twenty steps of fine-tuning beside the same in PyTorch: data, noise and times are shared."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import nchw
from diffusers import DDPMScheduler, StableDiffusionPipeline
from families import LENGTH, pipeline
from peft import LoraConfig

from jaxdiff.checkpoints.key_mapping import path_to_torch_key, to_torch
from jaxdiff.core.types import dtype_of
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.experiments.training_methods import make_training_method
from jaxdiff.training.config import (
    DiffusionObjective,
    EMAConfig,
    Full,
    LoRA,
    OptimiserConfig,
    TextualInversion,
    TimestepSampling,
)
from jaxdiff.training.objectives.diffusion import (
    Frozen,
    diffusion_task,
    drop_captions,
    sample_timesteps,
)
from jaxdiff.training.optimiser import learning_rate, make_optimiser
from jaxdiff.training.step import initial_state, make_step, per_sample_normal, per_sample_split

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.usefixtures("standard_promotion"),
]
STEPS, BATCH = 20, 4
OPTIMISER = OptimiserConfig(learning_rate=1e-3, warmup_steps=5, decay_fraction=0.5, clip_norm=0.5)
TARGETS, TEXT_TARGETS = ("to_q", "to_out.0", "conv1", "ff.net.0.proj"), ("q_proj", "fc1")


class Ours:
    """A training of the pipeline in a folder, as `train` makes it."""

    def __init__(self, folder, **choices):
        self.objective = DiffusionObjective(pipeline=str(folder), **choices)
        self.base = load_base_model(self.objective)
        dtype = dtype_of("float32")
        self.chosen = make_training_method(self.base, dtype, None)
        tuned = self.chosen.partition
        self.frozen = Frozen(
            weights={name: self.base.host_weights(name) for name in tuned.frozen},
            null={
                name: jnp.asarray(
                    self.chosen.caption_tokenizer([""])[self.base.family.id_columns[name]][0]
                )
                for name in self.base.text_encoders
            },
        )
        learner = diffusion_task(self.base.objective, tuned)
        transform = make_optimiser(OPTIMISER, STEPS)
        self.schedule = learning_rate(OPTIMISER, STEPS)
        self.first = dict(learner.init(3))
        self.state = initial_state({p: jnp.asarray(a) for p, a in self.first.items()}, transform)
        self.step = jax.jit(make_step(learner.loss, transform, self.schedule, EMAConfig(decay=0.9)))

    def drawn(self, step, batch, shape):
        """What the loss draws in a step: noise of latents, dropped captions, times, noise."""
        key = jax.random.fold_in(jax.random.key(5), step)
        latent, drop, time, noise = per_sample_split(key, BATCH, 4)
        texts = {
            name: jnp.asarray(batch[self.base.family.id_columns[name]])
            for name in self.base.text_encoders
        }
        rates = self.objective.caption_dropout, self.objective.caption_dropout_per_encoder
        ids, dropped = drop_captions(drop, texts, self.frozen.null, *rates)
        return (
            per_sample_normal(latent, shape),
            (ids, dropped),
            sample_timesteps(time, (BATCH,), 1000, TimestepSampling()),
            per_sample_normal(noise, shape),
        )


def batches(xl):
    """The same batches every time."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = {"image": np.tanh(rng.normal(size=(BATCH, 16, 16, 3))).astype(np.float32)}
        for name in ("ids", "ids_2") if xl else ("ids",):
            ids = rng.integers(1, 21, (BATCH, LENGTH)).astype(np.int32)
            ids[:, 0], ids[:, -2:] = 38, 39
            batch[name] = ids
        if xl:
            batch["time_ids"] = rng.integers(0, 64, (BATCH, 6)).astype(np.int32)
        yield batch


def tensor(array):
    return torch.from_numpy(np.array(array))


def told(pipe, ids, dropped, batch, silent):
    """What the UNet of diffusers is told."""
    ids = [tensor(each).long() for each in ids]
    if not hasattr(pipe, "text_encoder_2"):
        return {"encoder_hidden_states": pipe.text_encoder(ids[0]).last_hidden_state}
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    outputs = [f(i, output_hidden_states=True) for f, i in zip(encoders, ids, strict=True)]
    states = [output.hidden_states[-2] for output in outputs]
    pooled = outputs[1].text_embeds
    if silent:
        kept = [1 - tensor(each).float() for each in dropped]
        states = [s * k[:, None, None] for s, k in zip(states, kept, strict=True)]
        pooled = pooled * kept[1][:, None]
    added = {"text_embeds": pooled, "time_ids": tensor(batch["time_ids"]).float()}
    return {"encoder_hidden_states": torch.cat(states, -1), "added_cond_kwargs": added}


def their_loss(pipe, noising, batch, drawn, silent):
    latent_noise, (ids, dropped), t, noise = drawn
    with torch.no_grad():
        found = pipe.vae.encode(nchw(batch["image"])).latent_dist
        z = found.mean + torch.exp(0.5 * found.logvar) * nchw(np.array(latent_noise))
        x0 = z * pipe.vae.config.scaling_factor
    t, eps = tensor(t).long(), nchw(np.array(noise))
    output = pipe.unet(
        noising.add_noise(x0, eps, t), t, **told(pipe, ids, dropped, batch, silent)
    ).sample
    velocity = pipe.scheduler.config.prediction_type == "v_prediction"
    target = noising.get_velocity(x0, eps, t) if velocity else eps
    return torch.nn.functional.mse_loss(output, target)


def train_both(ours, pipe, parameters):
    """Train both for STEPS steps; the largest relative difference of their losses."""
    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": OPTIMISER.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = OPTIMISER.beta1, OPTIMISER.beta2
    adam = torch.optim.AdamW(groups, betas=betas, eps=OPTIMISER.epsilon)
    worst, clipped = 0.0, 0
    for step, batch in enumerate(batches(len(ours.base.text_encoders) > 1)):
        drawn = ours.drawn(step, batch, (BATCH, 8, 8, 4))
        arrays = {name: jnp.asarray(array) for name, array in batch.items()}
        ours.state, metrics = ours.step(ours.state, ours.frozen, arrays, jax.random.key(5))
        for group in adam.param_groups:
            group["lr"] = float(ours.schedule(step))
        loss = their_loss(pipe, noising, batch, drawn, ours.base.family.zero_uncond)
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, OPTIMISER.clip_norm)
        clipped += bool(norm > OPTIMISER.clip_norm)
        adam.step()
        worst = max(worst, abs(float(metrics["loss"]) / loss.item() - 1))
    assert clipped > 0
    return worst


def compared(ours, theirs):
    """The largest difference of weights after training, and how far one has moved."""
    assert ours.state.params.keys() == theirs.keys()
    # Attention does not heed the bias of its keys, which rounding alone moves.
    heeded = [path for path in theirs if not path.endswith("k_proj.bias")]
    after = {path: np.asarray(ours.state.params[path]) for path in heeded}
    apart = max(np.abs(to_torch(after[p], p) - theirs[p].detach().numpy()).max() for p in after)
    moved = {path: np.abs(array - ours.first[path]).max() for path, array in after.items()}
    return apart, moved


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("sd1", {"caption_dropout": 0.3}),
        ("sd2", {"trainable": Full(text_encoders=True)}),
        ("sdxl", {"caption_dropout": 0.2, "caption_dropout_per_encoder": (0.3, 0.3)}),
    ],
    ids=["sd1", "sd2-with-text", "sdxl"],
)
def test_all_weights(tmp_path, family, choices):
    pipe = pipeline(family)
    pipe.save_pretrained(tmp_path / "model")
    ours = Ours(tmp_path / "model", **choices)
    prefixed = "trainable" in choices
    theirs = {}
    for path in ours.first:
        name, _, rest = path.partition(".") if prefixed else ("unet", "", path)
        module, key = getattr(pipe, name), path_to_torch_key(rest)
        known = dict(module.named_parameters())
        theirs[path] = known[key if key in known else key.removeprefix("text_model.")]
    loss = train_both(ours, pipe, list(theirs.values()))
    apart, moved = compared(ours, theirs)
    print(f"{family}: losses {loss:.1e}, weights {apart:.1e}, moved {min(moved.values()):.1e}")
    assert loss < 1e-4
    assert apart < 1e-4
    assert min(moved.values()) > 1e-3

    params = {path: np.asarray(array) for path, array in ours.state.params.items()}
    ours.chosen.export(params, tmp_path / "export")
    read = type(pipe).from_pretrained(tmp_path / "export")
    for path, array in params.items():
        name, _, rest = path.partition(".") if prefixed else ("unet", "", path)
        table = getattr(read, name).state_dict()
        key = path_to_torch_key(rest)
        stored = table[key if key in table else key.removeprefix("text_model.")].numpy()
        np.testing.assert_array_equal(stored, to_torch(array, rest))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_low_rank_changes(tmp_path, family):
    """PEFT's layers beside ours, and the file that is exported in a pipeline of diffusers."""
    pipe = pipeline(family)
    pipe.save_pretrained(tmp_path / "model")
    train = LoRA(rank=3, alpha=6.0, target_modules=TARGETS, text_target_modules=TEXT_TARGETS)
    ours = Ours(tmp_path / "model", trainable=train, caption_dropout=0.0)
    known = {}
    for name in ("unet", *ours.base.text_encoders):
        targets = TARGETS if name == "unet" else TEXT_TARGETS
        module = getattr(pipe, name)
        module.requires_grad_(False)
        module.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=list(targets)))
        known |= {f"{name}.{key}": p for key, p in module.named_parameters() if p.requires_grad}
    theirs = {}
    for path, array in ours.first.items():
        key = path_to_torch_key(path).replace(".weight", ".default.weight")
        theirs[path] = known.pop(key if key in known else key.replace("text_model.", ""))
        with torch.no_grad():
            theirs[path].copy_(tensor(to_torch(array, path)))
    # SDXL is told the states before the last layer of the first encoder.
    assert all(re.match(r"text_encoder\.(text_model\.)?encoder\.layers\.1\.", key) for key in known)
    assert bool(known) == (family == "sdxl")
    loss = train_both(ours, pipe, list(theirs.values()))
    apart, moved = compared(ours, theirs)
    print(f"{family} LoRA: losses {loss:.1e}, weights {apart:.1e}")
    assert loss < 1e-4
    assert apart < 1e-4
    assert min(moved.values()) > 1e-3

    params = {path: np.asarray(array) for path, array in ours.state.params.items()}
    ours.chosen.export(params, tmp_path / "export")
    read = type(pipe).from_pretrained(tmp_path / "model")
    read.load_lora_weights(tmp_path / "export")
    read.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    plain = type(pipe).from_pretrained(tmp_path / "model")
    plain.set_progress_bar_config(disable=True)
    pictures = [drawn_by(each) for each in (read, pipe, plain)]
    size = np.abs(pictures[1]).max()
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-3 * size
    assert np.abs(pictures[1] - pictures[2]).max() > 1e-2 * size


def drawn_by(pipe):
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    way = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    return pipe("abc de", latents=noise, **way).images.detach().numpy()


def test_a_learnt_word(tmp_path):
    """The vectors are what diffusers' tokenizer and encoder make of the word."""
    pipeline("sd1").save_pretrained(tmp_path / "model")
    train = TextualInversion(placeholder_token="<x>", initializer_token="b", num_vectors=2)
    ours = Ours(tmp_path / "model", trainable=train)
    rows = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)
    base = np.array(ours.first["text_encoder.vectors"])
    ours.chosen.export({"text_encoder.vectors": rows}, tmp_path / "export")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    table = pipe.text_encoder.get_input_embeddings().weight.detach().numpy().copy()
    np.testing.assert_array_equal(base, np.tile(table[pipe.tokenizer.encode("b")[1]], (2, 1)))
    pipe.load_textual_inversion(tmp_path / "export" / "learned_embeds.safetensors")
    prompt = pipe.maybe_convert_prompt("a <x> c", pipe.tokenizer)
    ids = pipe.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    read = pipe.text_encoder.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(read[ids[1:3]], rows)
    (own,) = ours.chosen.caption_tokenizer(["a <x> c"])["ids"]
    np.testing.assert_array_equal(own[1:5], ids)
