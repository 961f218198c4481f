"""The VAE of a small text-to-emoji model: 64x64 images to 8x8 latents of 16 channels.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python train.py configs/emoji_vae.py --workdir runs/emoji/vae

docs/training.md, "From a folder to a model", has what comes before and after.
"""

from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.training.config import (
    DataConfig,
    EMAConfig,
    OptimiserConfig,
    TrainConfig,
    VAEObjective,
)

config = TrainConfig(
    objective=VAEObjective(
        model=AutoencoderKLConfig(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 64, 96),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=8,
            sample_size=64,
        ),
        kl_weight=1e-4,
    ),
    data=DataConfig(kind="folder", path="runs/emoji/pictures", resolution=64),
    optimiser=OptimiserConfig(
        name="muon", learning_rate=2e-3, warmup_steps=100, decay_fraction=0.5
    ),
    steps=6_000,
    batch_size=16,
    ema=EMAConfig(decay=0.999),
    log_every=50,
    checkpoint_every=500,
    sample_every=1000,
)
