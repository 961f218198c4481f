"""The text encoder of a small text-to-emoji model: names of characters against their images.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python train.py configs/emoji_clip.py --workdir runs/emoji/clip

docs/training.md, "From a folder to a model", has what comes before and after.
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
            vocab_size=2560,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=24,
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
    data=DataConfig(kind="folder", path="runs/emoji/pictures", resolution=64),
    optimiser=OptimiserConfig(name="muon", learning_rate=1e-3, warmup_steps=50, decay_fraction=0.5),
    steps=600,
    batch_size=128,
    ema=EMAConfig(decay=0.99),
    log_every=50,
    checkpoint_every=200,
    sample_every=200,
)
