"""The text encoder of the embedded model: captions of scenes against the scenes.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python train.py configs/scenes_clip.py --workdir runs/scenes_clip

640,000 pictures, 35 minutes on two CPU cores that other work shared, in two goes: to step 1,200
first (`--steps 1200`, where the learning rate fell to 0), then on. Of 256 validation pictures 88%
find their caption among all, and 93% among four that differ in one thing (validation_retrieval and
validation_retrieval_hard in the log's last line); after the first go it was 68% and 79%.
"""

from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.training.config import (
    CLIPObjective,
    DataConfig,
    EMAConfig,
    OptimiserConfig,
    TrainConfig,
)

config = TrainConfig(
    objective=CLIPObjective(
        text=CLIPTextConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=32,
        ),
        vision=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
        ),
        projection_dim=128,
    ),
    data=DataConfig(variations=4),
    optimiser=OptimiserConfig(learning_rate=1e-3, warmup_steps=200, decay_fraction=0.5),
    steps=5_000,
    batch_size=128,
    ema=EMAConfig(decay=0.999),
    log_every=50,
    checkpoint_every=500,
    sample_every=500,
)
