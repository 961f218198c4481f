"""The classifier of the embedded model: what noisy latents of scenes show, for classifier guidance.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python train.py configs/scenes_classifier.py --workdir runs/scenes_classifier
    python -m jaxdiff export runs/scenes_classifier runs/scenes

691,638 parameters; 140,800 pictures, each at two noise levels; 48 minutes on two CPU cores that
much other work shared. `PYTHONPATH=. python benchmarks/classifier.py` gives the shares of right
answers on 1,024 scenes that were not trained on:

    at time              0       250       500       750       950   by guessing
    background        1.00      1.00      1.00       .98       .71           .33
    layout            1.00      1.00      1.00       .92       .62           .35
    first size        1.00      1.00       .99       .86       .63           .50
    first colour      1.00      1.00       .97       .64       .28           .13
    first shape       1.00       .98       .86       .44       .23           .17

"First" is the only object, the left or the upper one; the second is told as well. Where a pair of
colour and shape was never trained on, the first colour is right in .96 at time 0 and .85 at 500,
the first shape in .97 and .80.
"""

from jaxdiff.models.classifier import LatentClassifierConfig
from jaxdiff.scenes.labels import ATTRIBUTES
from jaxdiff.training.config import ClassifierObjective, EMAConfig, OptimiserConfig, TrainConfig

config = TrainConfig(
    objective=ClassifierObjective(
        vae="jaxdiff/assets/scenes/vae",
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
    optimiser=OptimiserConfig(learning_rate=1.5e-3, warmup_steps=100, decay_fraction=0.4),
    steps=2_200,
    batch_size=64,
    ema=EMAConfig(decay=0.999),
    log_every=100,
    checkpoint_every=500,
    sample_every=500,
)
