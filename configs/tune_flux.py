"""All weights of FLUX.1 dev's transformer, on latents and cached text states.

    hf download black-forest-labs/FLUX.1-dev --local-dir black-forest-labs/FLUX.1-dev
    python -m jaxdiff cache-latents black-forest-labs/FLUX.1-dev data/latents-flux \
        --kind tars --path gs://BUCKET/tars --resolution 1024 --max-aspect-ratio 2 \
        --dtype bfloat16 --texts embeddings
    python train.py configs/tune_flux.py --workdir runs/flux              # 8 GPUs, or 64 chips
    python train.py configs/tune_flux.py --plan v5e:8x8 v5p:4x4x4         # without any

The caches have 4.2 MB of text states for each image (docs/data.md), so that no step runs T5.
Weights, EMA and optimiser state of 11.9 billion parameters are 190 GB in float32, shared by all
devices. Times are sampled by a logit-normal distribution and shifted by the number of tokens of
an image. The network is guidance-distilled, and takes a guidance scale also while it is trained:
1, for images that no guidance has made; with `--objective.distilled-guidance-scale 3.5` it learns
what the scale 3.5 gives. Sample grids need T5 and CLIP: `--sample-every 1000` keeps them on the
devices.

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
        pipeline="black-forest-labs/FLUX.1-dev",
        timestep_sampling="logit_normal",
        timestep_shift_by_resolution=True,
        distilled_guidance_scale=1.0,
        caption_dropout=0.1,
        sample_guidance_scale=3.5,
        remat="blocks",
    ),
    data=DataConfig(kind="latents", text_embeddings=True, path="data/latents-flux"),
    optimiser=OptimiserConfig(learning_rate=1e-5, beta2=0.999, warmup_steps=500),
    mesh=MeshConfig(data=1, fsdp=-1),
    steps=10_000,
    batch_size=64,
    dtype="bfloat16",
    ema=EMAConfig(decay=0.999),
    sample_every=0,
)
