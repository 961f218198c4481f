"""Class-conditional LDM: its published size, images to begin with, and training from scratch."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from captioned_images import write_folder
from PIL import Image

import jaxdiff
from jaxdiff.checkpoints.components import write_component
from jaxdiff.checkpoints.key_mapping import path_to_torch_key, torch_shape
from jaxdiff.core.configs import to_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import flatten
from jaxdiff.models.build import abstract, param_dict
from jaxdiff.models.presets import preset
from jaxdiff.models.unet.class_conditional import (
    ClassConditionalUNet2DConfig,
    ClassConditionalUNet2DModel,
)
from jaxdiff.models.vq_model import VQModel, VQModelConfig
from jaxdiff.training.config import DataConfig, DiffusionObjective, OptimiserConfig, TrainConfig

INVENTORY = pathlib.Path(__file__).parents[1] / "models/inventories/unet-ldm-cin256.json"
CONFIG = ClassConditionalUNet2DConfig(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=2,
    cross_attention_dim=6,
    attention_head_dim=1,
    num_classes=3,
)
VQ = VQModelConfig(
    block_out_channels=(4, 4),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=2,
    num_vq_embeddings=16,
    mid_block_add_attention=False,
    scaling_factor=1.0,
)


def test_the_published_names_and_a_table_of_classes():
    """1001 classes of width 512, where the original has `cond_stage_model.embedding.weight`."""
    config = ClassConditionalUNet2DConfig(**to_mapping(preset("unet", "ldm-cin256").config))
    ours = param_dict(abstract(ClassConditionalUNet2DModel, config))
    found = {path_to_torch_key(path): torch_shape(w.shape, path) for path, w in ours.items()}
    assert found.pop("class_embedder.embedding_table.weight") == (1001, 512)
    shapes = flatten(json.loads(INVENTORY.read_text())["shapes"])
    assert found == {key: tuple(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cross_attention_dim": (6,)}, "cross_attention_dim: got"),
        ({"num_classes": 0}, "num_classes: got 0, expected a number above 0"),
        ({"time_cond_proj_dim": 4}, "time_cond_proj_dim: got 4, expected null with classes"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **fields)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_from_scratch_to_images(tmp_path):
    """Captions are numbers; latents are trained on before they are quantised."""
    codec = tiny.random_component(VQModel, VQ, seed=3)
    write_component(tmp_path / "vq", codec)
    write_folder(tmp_path / "images", 24, sizes=((16, 16),))
    for i, file in enumerate(sorted((tmp_path / "images").glob("*.txt"))):
        file.write_text(str(i % 3))
    data = DataConfig(
        kind="folder",
        path=str(tmp_path / "images"),
        resolution=16,
        bucket_multiple=8,
        validation_size=2,
        cache_dir=str(tmp_path / "cache"),
    )
    config = TrainConfig(
        objective=DiffusionObjective(model=CONFIG, vae=str(tmp_path / "vq"), sample_steps=2),
        data=data,
        steps=2,
        batch_size=8,
        log_every=1,
        sample_every=2,
        checkpoint_every=2,
        tensorboard=False,
        optimiser=OptimiserConfig(warmup_steps=1),
    )
    result = jaxdiff.train(config, tmp_path / "run")
    pipe = tiny.first_devices(jaxdiff.load(result.export, dtype="float32"), 1)
    assert pipe.family.name == "class-conditional LDM"
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8))
    out = pipe("2", image=image, strength=0.5, steps=4, output="numpy")
    assert out.images.shape == (1, 16, 16, 3)
    pixels = jnp.asarray(image, jnp.float32)[None] / 127.5 - 1
    latents, logvar = pipe.vqvae.encode(pixels)
    assert logvar is None
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    options = {"image": image, "mask": mask, "steps": 2, "output": "latent"}
    kept = pipe("2", **options).images[0]
    np.testing.assert_allclose(kept[4:], latents[0, 4:], atol=1e-4)
