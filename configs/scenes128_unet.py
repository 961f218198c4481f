"""The UNet of the next embedded model: 8x8x16 latents of 128x128 scenes.

    export XLA_FLAGS=--xla_force_host_platform_device_count=2
    python -m jaxdiff cache-latents runs/scenes128_vae/export runs/scenes128_latents --kind scenes \
        --resolution 128 --items 98304 --batch-size 32 --shard-size 4096 \
        --texts embeddings --text-encoder runs/scenes128_clip/export
    python train.py configs/scenes128_unet.py --workdir runs/scenes128_unet

Needs runs/scenes128_vae/export and runs/scenes128_clip/export, which the other two configs make.
Not finished: after 1,279 of the steps, 164,000 samples in 55 minutes on two CPU cores that other
work shared, `python -m jaxdiff evaluate --prompt-stride 8` at guidance scale 3 and 25 steps of
dpmpp-2m gives: background, number, colour and relation 1.00, size .99, shape .98; all correct with
one object 1.00, with two .93 (of 41); with pairs never seen in training 1.00 and .88 (of 8 each);
circles deviate from round by 1.9% of their radius. After 64,000 samples the relation was 1.00 and
the shape .52.
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
        vae="runs/scenes128_vae/export",
        text_encoder="runs/scenes128_clip/export",
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
    data=DataConfig(kind="latents", path="runs/scenes128_latents", validation_size=256),
    optimiser=OptimiserConfig(
        name="muon", learning_rate=2e-3, warmup_steps=200, decay_fraction=0.3
    ),
    steps=6_000,
    batch_size=128,
    ema=EMAConfig(decay=0.999),
    log_every=50,
    checkpoint_every=500,
    sample_every=1000,
)
