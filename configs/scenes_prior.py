"""A prior (2204.06125, section 2.2): CLIP's embeddings of scenes from their captions.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python train.py configs/scenes_prior.py --workdir runs/scenes_prior

Needs runs/scenes_clip/export, which configs/scenes_clip.py makes.
"""

from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.models.prior.config import PriorTransformerConfig
from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    EMAConfig,
    OptimiserConfig,
    TrainConfig,
)

config = TrainConfig(
    objective=DiffusionObjective(
        text_encoder="runs/scenes_clip/export",
        image_encoder="runs/scenes_clip/export",
        model=PriorTransformerConfig(
            num_attention_heads=4,
            attention_head_dim=64,
            num_layers=4,
            embedding_dim=128,
            num_embeddings=24,
        ),
        schedule=VPSchedule(beta_schedule="squaredcos_cap_v2"),
        prediction_type="sample",
        sample_guidance_scale=1.0,
    ),
    data=DataConfig(resolution=128),
    optimiser=OptimiserConfig(
        name="muon", learning_rate=2e-3, warmup_steps=100, decay_fraction=0.3
    ),
    steps=400,
    batch_size=128,
    ema=EMAConfig(decay=0.995),
    log_every=50,
    checkpoint_every=100,
    sample_every=200,
)
