"""The classifier of the embedded model: what noisy latents of scenes show, for classifier guidance.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python train.py configs/scenes_classifier.py --workdir runs/scenes_classifier
    python -m jaxdiff export runs/scenes_classifier runs/scenes

691,638 parameters; 64,000 images, each at two noise levels; 10 minutes on two CPU cores that other
work shared. `PYTHONPATH=. python benchmarks/classifier.py` gives the fractions of right answers on
1,024 scenes that were not trained on:

    at timestep          0       250       500       750       950   chance
    background        1.00      1.00      1.00       .97       .69      .33
    layout            1.00      1.00      1.00       .93       .67      .35
    first size        1.00      1.00       .99       .86       .65      .50
    first colour      1.00      1.00       .93       .61       .27      .13
    first shape        .99       .98       .89       .47       .22      .17

"First" is the only object, the left or the upper one; the second is classified as well. Where a
combination of colour and shape was never trained on, the first colour is right in .96 at timestep 0
and .79 at 500, the first shape in .96 and .83.
"""

from jaxdiff.models.classifier import LatentClassifierConfig
from jaxdiff.scenes.labels import ATTRIBUTES
from jaxdiff.training.config import (
    ClassifierObjective,
    DataConfig,
    EMAConfig,
    OptimiserConfig,
    TrainConfig,
)

config = TrainConfig(
    objective=ClassifierObjective(
        vae="runs/scenes_decoder/export",
        model=LatentClassifierConfig(
            sample_size=8,
            in_channels=16,
            block_out_channels=(64, 128),
            layers_per_block=1,
            attention_head_dim=32,
            norm_num_groups=16,
        ).with_labels(ATTRIBUTES),
        timestep_shift=2.0,
        noise_levels_per_image=2,
    ),
    data=DataConfig(resolution=128),
    optimiser=OptimiserConfig(
        name="muon", learning_rate=1.5e-3, warmup_steps=50, decay_fraction=0.5
    ),
    steps=1_000,
    batch_size=64,
    ema=EMAConfig(decay=0.999),
    log_every=100,
    checkpoint_every=500,
    sample_every=500,
)
