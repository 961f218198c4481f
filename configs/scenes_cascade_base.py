"""The first stage of a cascade of pixels (2205.11487): 32x32 scenes of their captions.

export XLA_FLAGS=--xla_force_host_platform_device_count=2
python train.py configs/scenes_cascade_base.py --workdir runs/scenes_cascade_base
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
        text_encoder="runs/scenes_clip/export",
        model=UNet2DConditionConfig(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64, 128),
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=128,
            attention_head_dim=4,
            use_linear_projection=True,
            time_embedding_dim=256,
        ),
        schedule=VPSchedule(beta_schedule="squaredcos_cap_v2"),
        prediction_type="v_prediction",
        sample_guidance_scale=3.0,
        num_eval_images=0,
    ),
    data=DataConfig(resolution=32),
    optimiser=OptimiserConfig(
        name="muon", learning_rate=2e-3, warmup_steps=100, decay_fraction=0.3
    ),
    steps=700,
    batch_size=128,
    ema=EMAConfig(decay=0.995),
    log_every=25,
    checkpoint_every=100,
    sample_every=350,
)
