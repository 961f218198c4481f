"""The smallest networks that diffusion trainings are tested with."""

import functools

import jax.numpy as jnp

from jaxdiff.models.build import abstract, initialise, param_dict
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.training.config import DiffusionObjective
from jaxdiff.training.objectives.diffusion import Frozen

OBJECTIVE = DiffusionObjective(
    vae="",
    text_encoder="",
    model=UNet2DConditionConfig(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
    ),
)
VAE = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(4, 4),
    norm_num_groups=2,
    latent_channels=2,
    mid_block_add_attention=False,
)
TEXT = CLIPTextConfig(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    max_position_embeddings=5,
    eos_token_id=19,
)


def networks(config=OBJECTIVE, dtype=jnp.float32, unet=UNet2DConditionModel):
    """The abstract networks of a model with one text encoder, and of class `unet`."""
    return {
        "unet": abstract(unet, config.model, dtype=dtype, remat=config.remat),
        "vae": abstract(AutoencoderKL, VAE, dtype=dtype),
        "text_encoder": abstract(CLIPTextModel, TEXT, dtype=dtype),
    }


@functools.cache
def frozen():
    """Weights for all but the UNet, and the ids of the empty caption."""
    return Frozen(
        weights={
            "vae": param_dict(initialise(AutoencoderKL, VAE, seed=0)),
            "text_encoder": param_dict(initialise(CLIPTextModel, TEXT, seed=1)),
        },
        null={"text_encoder": jnp.asarray([18, 19, 19, 19, 19])},
    )
