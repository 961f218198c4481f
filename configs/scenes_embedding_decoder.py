"""A decoder of the embeddings of scenes (2204.06125): latents of an embedding, and of no caption.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python train.py configs/scenes_embedding_decoder.py --workdir runs/scenes_embedding_decoder

The network is the UNet of the embedded model, on the same latents. Needs runs/scenes_clip/export
and runs/scenes_decoder/export, which other configs make.
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
        image_encoder="runs/scenes_clip/export",
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
            encoder_hid_dim=128,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
            learned_variance=False,
        ),
        prediction_type="v_prediction",
        timestep_shift=2.5,
        sample_guidance_scale=2.0,
        num_eval_images=0,
    ),
    data=DataConfig(resolution=128),
    optimiser=OptimiserConfig(
        name="muon", learning_rate=2e-3, warmup_steps=100, decay_fraction=0.3
    ),
    steps=700,
    batch_size=128,
    ema=EMAConfig(decay=0.995),
    log_every=50,
    checkpoint_every=50,
    sample_every=350,
)
