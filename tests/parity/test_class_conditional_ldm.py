"""Class-conditional LDM against diffusers' UNet, VQModel and DDIM in a loop of one's own.

The original model is a table of classes, whose row is the UNet's context, beside these; diffusers
has no pipeline of it.
"""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import copy, image, nchw, randomise, to_ours
from families import CROSS_DOWN, CROSS_UP, DOWN, UP
from tiny import first_devices

import jaxdiff
from jaxdiff.checkpoints.components import Component
from jaxdiff.checkpoints.pipelines import PipelineComponents, write_pipeline
from jaxdiff.core.configs import from_mapping
from jaxdiff.models.build import abstract, with_params
from jaxdiff.models.unet.class_conditional import (
    ClassConditionalUNet2DConfig,
    ClassConditionalUNet2DModel,
)
from jaxdiff.models.vq_model import VQModel, VQModelConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLASSES, STEPS, SCALE = 6, 20, 3.0
UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": (DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, UP),
    "block_out_channels": (8, 16),
    "cross_attention_dim": 12,
    "attention_head_dim": 1,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
VQ = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "num_vq_embeddings": 40,
    "scaling_factor": 1.0,
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}


@torch.no_grad()
def theirs(unet, table, codec, noise, labels):
    """The latents and the images of a guided loop."""
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    x, null = nchw(noise), torch.full((len(labels),), CLASSES)
    for t in scheduler.timesteps:
        uncond, cond = (
            unet(x, t, encoder_hidden_states=table(y)[:, None]).sample
            for y in (null, torch.tensor(labels))
        )
        x = scheduler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
    return x.numpy().transpose(0, 2, 3, 1), codec.decode(x).sample.numpy().transpose(0, 2, 3, 1)


def test_generated_classes(tmp_path):
    unet = randomise(diffusers.UNet2DConditionModel(**UNET), 1)
    codec = randomise(diffusers.VQModel(**VQ), 2)
    table = randomise(torch.nn.Embedding(CLASSES + 1, 12), 3)
    fields = UNET | {"num_classes": CLASSES}
    config = from_mapping(ClassConditionalUNet2DConfig, fields, source="test")
    weights = to_ours(unet.state_dict() | {"class_embedder.embedding_table.weight": table.weight})
    network = with_params(
        abstract(ClassConditionalUNet2DModel, config),
        {path: jnp.asarray(array) for path, array in weights.items()},
    )
    ours = copy(codec, VQModel, from_mapping(VQModelConfig, VQ, source="test"))
    parts = PipelineComponents(
        class_name="LDMClassConditionalPipeline",
        components={"unet": Component(module=network), "vqvae": Component(module=ours)},
        scheduler={"_class_name": "DDIMScheduler", **BETAS, "clip_sample": False},
    )
    write_pipeline(tmp_path / "model", parts)
    pipe = first_devices(jaxdiff.load(tmp_path / "model", dtype="float32"), 1)
    noise, labels = image((2, 8, 8, 3), seed=5), [4, 0]
    latents, images = theirs(unet, table, codec, noise, labels)
    options = {"steps": STEPS, "latents": noise}
    got = pipe(["4", "0"], output="latent", **options).images
    assert np.abs(got - latents).max() / np.abs(latents).max() < 1e-3
    pixels = pipe("", class_label=labels, output="numpy", **options).images / 255
    assert np.abs(pixels - np.clip(images / 2 + 0.5, 0, 1)).max() < 1.01 / 255
    assert (pipe.defaults.guidance_scale, pipe.family.name) == (SCALE, "class-conditional LDM")
