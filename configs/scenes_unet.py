"""The UNet of the embedded model: 8x8x16 latents of scenes, told by their captions.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python train.py configs/scenes_unet.py --workdir runs/scenes_unet

Needs runs/scenes_vae/export and runs/scenes_clip/export, which the other two configs make, the text
encoder after its first 1,200 steps. 384,000 pictures, 92 minutes on two CPU cores that other work
shared: validation loss 0.120 (validation_loss in the log's last line). The pictures have the right
colours and sizes, half of the shapes and no relations; scenes_unet_longer.py goes on from here.
"""

from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.training.config import DiffusionObjective, EMAConfig, OptimiserConfig, TrainConfig

config = TrainConfig(
    objective=DiffusionObjective(
        vae="runs/scenes_vae/export",
        text_encoder="runs/scenes_clip/export",
        model=UNet2DConditionConfig(
            sample_size=8,
            in_channels=16,
            out_channels=16,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(128, 128),
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=128,
            attention_head_dim=4,
            use_linear_projection=True,
        ),
        prediction_type="v_prediction",
    ),
    optimiser=OptimiserConfig(learning_rate=1e-3, warmup_steps=500, decay_fraction=0.3),
    steps=6_000,
    batch_size=64,
    ema=EMAConfig(decay=0.999),
    log_every=100,
    checkpoint_every=1000,
    sample_every=1000,
)
