"""The decoder of the embedded model, trained alone: the latents stay those of scenes_vae.py.

    export XLA_FLAGS=--xla_force_host_platform_device_count=2
    python train.py configs/scenes_decoder.py --workdir runs/scenes_decoder_clean
    python train.py configs/scenes_decoder.py --workdir runs/scenes_decoder --steps 1500 \
        --objective.weights runs/scenes_decoder_clean/export --objective.latent-noise 0.25

32,000 images, 25 minutes on two CPU cores that other work shared: from 33.2 to 35.5 dB on
validation images (validation_psnr in the log's last line). Then 24,000 images, 20 minutes, with
noise on the latents, since those of the UNet are not exactly those of the encoder: 36.1 dB, and the
spots beside the objects become fainter.
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
            down_block_types=("DownEncoderBlock2D",) * 5,
            up_block_types=("UpDecoderBlock2D",) * 5,
            block_out_channels=(8, 16, 32, 64, 96),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=8,
            sample_size=128,
        ),
        weights="runs/scenes_vae/export",
        freeze_encoder=True,
        kl_weight=0.0,
    ),
    data=DataConfig(resolution=128),
    optimiser=OptimiserConfig(
        name="muon", learning_rate=1e-3, warmup_steps=100, decay_fraction=0.7
    ),
    steps=2_000,
    batch_size=16,
    ema=EMAConfig(decay=0.999),
    log_every=50,
    checkpoint_every=500,
    sample_every=500,
)
