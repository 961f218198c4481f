"""The VAE of the embedded model: 64x64 scenes to 8x8 latents of 16 channels.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python train.py configs/scenes_vae.py --workdir runs/scenes_vae

32,000 pictures, 22 minutes on two CPU cores that other work shared: 34.0 dB on validation pictures
(validation_psnr in the log's last line). `python benchmarks/detector.py --vae
runs/scenes_vae/export` measures what the detector finds in its reconstructions.
"""

from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.training.config import EMAConfig, OptimiserConfig, TrainConfig, VAEObjective

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
        l1_weight=1.0,
        l2_weight=1.0,
        edge_weight=1.0,
        kl_weight=1e-4,
    ),
    optimiser=OptimiserConfig(learning_rate=1.5e-3, warmup_steps=200, decay_fraction=0.45),
    steps=2_000,
    batch_size=16,
    ema=EMAConfig(decay=0.999),
    log_every=50,
    checkpoint_every=500,
    sample_every=1000,
)
