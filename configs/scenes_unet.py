"""The UNet of the embedded model: 8x8x16 latents of 128x128 scenes.

    export XLA_FLAGS=--xla_force_host_platform_device_count=2
    python -m jaxdiff cache-latents runs/scenes_decoder/export runs/scenes_latents --kind scenes \
        --resolution 128 --num-scenes 98304 --batch-size 32 --shard-size 4096 \
        --texts embeddings --text-encoder runs/scenes_clip/export
    python train.py configs/scenes_unet.py --workdir runs/scenes_unet_first

Needs runs/scenes_decoder/export and runs/scenes_clip/export, which other configs make. 358,400
samples in 111 minutes on two CPU cores that other work shared. `python -m jaxdiff evaluate` at
guidance scale 3 and 25 steps of dpmpp-2m gives: background, number, colour, size, relation 1.00,
shape .99; all correct with one object 1.00, with two .98; .98 with one and with two objects where
their combinations of colour and shape were never trained on; circles deviate from round by 1.5%
of their radius. After 64,000 samples the relation was 1.00 and the shape .52.

A second stage draws cleaner outlines: 166,400 samples, 54 minutes.

    python train.py configs/scenes_unet.py --workdir runs/scenes_unet --steps 1300 \
        --objective.weights runs/scenes_unet_first/export/unet --objective.timestep-shift 1.5 \
        --data.seed 1 --optimiser.learning-rate 1e-3 --optimiser.warmup-steps 50 \
        --optimiser.decay-fraction 0.6

Then shape .995, all correct 1.00 and .985, held-out combinations 1.00 and 1.00, circles 1.0%.
docs/embedded-model.md has all measurements.
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
        vae="runs/scenes_decoder/export",
        text_encoder="runs/scenes_clip/export",
        model=UNet2DConditionConfig(
            sample_size=8,
            in_channels=16,
            out_channels=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(128, 128),
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=128,
            attention_head_dim=4,
            use_linear_projection=True,
            time_embedding_dim=256,
        ),
        prediction_type="v_prediction",
        timestep_shift=2.5,
        sample_guidance_scale=3.0,
        num_eval_images=0,
    ),
    data=DataConfig(kind="latents", path="runs/scenes_latents", validation_size=256),
    optimiser=OptimiserConfig(
        name="muon", learning_rate=2e-3, warmup_steps=200, decay_fraction=0.3
    ),
    steps=2_800,
    batch_size=128,
    ema=EMAConfig(decay=0.999),
    log_every=50,
    checkpoint_every=500,
    sample_every=1000,
)
