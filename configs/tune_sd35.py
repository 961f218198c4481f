"""All weights of Stable Diffusion 3.5 medium's transformer, on latents and cached text states.

    hf download stabilityai/stable-diffusion-3.5-medium --local-dir \
        stabilityai/stable-diffusion-3.5-medium
    python -m jaxdiff cache-latents stabilityai/stable-diffusion-3.5-medium data/latents-sd35 \
        --kind tars --path gs://BUCKET/tars --resolution 1024 --max-aspect-ratio 2 \
        --dtype bfloat16 --texts embeddings
    python train.py configs/tune_sd35.py --workdir runs/sd35              # 8 GPUs, or 32 chips
    python train.py configs/tune_sd35.py --plan v5e:4x8 v6e:4x8           # without any

The caches have 2.4 MB of text states for each image (docs/data.md), so that no step runs a text
encoder. Times are sampled by a logit-normal distribution and then shifted by the scheduler's shift
of 3 (2403.03206, sections 3.1 and 5.3.2). Without sample grids no device has the T5 of 9.5 GB;
`--sample-every 1000` shares it between them. runs/sd35/export is a pipeline folder.

From random weights: `--objective.trainable.from-scratch --optimiser.learning-rate 1e-4`, and as
many steps as that needs.
"""

from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    EMAConfig,
    MeshConfig,
    OptimiserConfig,
    TrainConfig,
)

config = TrainConfig(
    objective=DiffusionObjective(
        pipeline="stabilityai/stable-diffusion-3.5-medium",
        timestep_sampling="logit_normal",
        caption_dropout=0.1,
        sample_guidance_scale=4.5,
        remat="blocks",
    ),
    data=DataConfig(kind="latents", text_embeddings=True, path="data/latents-sd35"),
    optimiser=OptimiserConfig(learning_rate=1e-5, beta2=0.999, warmup_steps=500),
    mesh=MeshConfig(data=1, fsdp=-1),
    steps=10_000,
    batch_size=64,
    dtype="bfloat16",
    ema=EMAConfig(decay=0.999),
    sample_every=0,
)
