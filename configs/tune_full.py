"""All weights of Stable Diffusion XL's UNet, from latents that were encoded once.

    python -m jaxdiff cache-latents MODEL LATENTS --kind tars --path gs://BUCKET/tars \
        --resolution 1024 --max-aspect-ratio 2
    python train.py configs/tune_full.py --workdir runs/xl --objective.pipeline MODEL \
        --data.path LATENTS --mesh.data 1 --mesh.fsdp -1

MODEL is a diffusers folder. runs/xl/export is one too: the same text encoders and VAE,
and the UNet. Each encoder loses captions of its own, as in the first training (2307.01952).
"""

from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    OptimiserConfig,
    TrainConfig,
)

config = TrainConfig(
    objective=DiffusionObjective(
        pipeline="stabilityai/stable-diffusion-xl-base-1.0",
        caption_dropout=0.05,
        caption_dropout_per_encoder=(0.1, 0.1),
        remat="blocks",
    ),
    data=DataConfig(kind="latents", path="latents"),
    optimiser=OptimiserConfig(learning_rate=1e-5, warmup_steps=500),
    steps=10_000,
    batch_size=64,
    dtype="bfloat16",
    sample_every=1000,
)
