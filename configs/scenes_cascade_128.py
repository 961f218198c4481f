"""The last stage of a cascade of pixels (2205.11487): scenes of 64x64 pixels to 128x128.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python train.py configs/scenes_cascade_128.py --workdir runs/scenes_cascade_128

It needs nothing of the other stages: it learns from real images, made smaller, with noise of a
level that it knows (noise conditioning augmentation).
"""

from jaxdiff.diffusion.schedules import VPSchedule
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
        vae="pixels",
        enlargement=2,
        text_encoder="runs/scenes_clip/export",
        model=UNet2DConditionConfig(
            sample_size=128,
            in_channels=6,
            out_channels=3,
            class_embed_type="timestep",
            down_block_types=(*("DownBlock2D",) * 4, "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", *("UpBlock2D",) * 4),
            block_out_channels=(16, 16, 32, 64, 128),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=128,
            attention_head_dim=4,
            use_linear_projection=True,
            time_embedding_dim=256,
        ),
        schedule=VPSchedule(beta_schedule="squaredcos_cap_v2"),
        prediction_type="v_prediction",
        sample_guidance_scale=1.0,
        num_eval_images=0,
    ),
    data=DataConfig(resolution=128),
    optimiser=OptimiserConfig(
        name="muon", learning_rate=2e-3, warmup_steps=100, decay_fraction=0.3
    ),
    steps=900,
    batch_size=16,
    ema=EMAConfig(decay=0.995),
    log_every=50,
    checkpoint_every=100,
    sample_every=450,
)
