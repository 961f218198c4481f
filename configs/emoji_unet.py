"""The UNet of a small text-to-emoji model: 8x8x16 latents, conditioned on names of characters.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python train.py configs/emoji_unet.py --workdir runs/emoji/unet

docs/training.md, "From a folder to a model", has what comes before and after.
"""

from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    EMAConfig,
    OptimiserConfig,
    TrainConfig,
)

config = TrainConfig(
    objective=DiffusionObjective(
        vae="runs/emoji/vae/export",
        text_encoder="runs/emoji/clip/export",
        model=UNet2DConditionConfig(
            sample_size=8,
            in_channels=16,
            out_channels=16,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(128, 192),
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=128,
            attention_head_dim=4,
            use_linear_projection=True,
        ),
        prediction_type="v_prediction",
        timestep_shift=2.0,
        sample_guidance_scale=3.0,
    ),
    data=DataConfig(kind="latents", path="runs/emoji/latents"),
    optimiser=OptimiserConfig(
        name="muon", learning_rate=2e-3, warmup_steps=200, decay_fraction=0.4
    ),
    steps=2_500,
    batch_size=128,
    ema=EMAConfig(decay=0.999),
    log_every=50,
    checkpoint_every=500,
    sample_every=1000,
)
