"""DiT-XL/2 from scratch as a flow (SiT, 2401.08740), on cached latents of images of classes.

    hf download facebook/DiT-XL-2-256 --local-dir facebook/DiT-XL-2-256
    python -m jaxdiff cache-latents facebook/DiT-XL-2-256 data/latents-256 \
        --kind tars --path gs://BUCKET/tars --resolution 256
    python train.py configs/dit.py --workdir runs/dit                     # 256 chips
    python train.py configs/dit.py --plan v5e:16x16 v6e:16x16             # without any
    python generate.py 207 --model runs/dit/export --guidance-scale 4

The caption of an image is the number of its class, 0 to 999, for example in a .txt file beside it
(docs/data.md); with the field `class_names` it is a name. Only the VAE of the repository is used.
The network predicts the velocity alone, without the variance that the published one learns. SiT
trains with 256 images a step at the same learning rate, for 400 thousand to 7 million steps:
`--batch-size 256 --steps 7000000`.
"""

import dataclasses

from jaxdiff.diffusion.schedules import FlowSchedule
from jaxdiff.models.presets import preset
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
        vae="facebook/DiT-XL-2-256/vae",
        model=dataclasses.replace(preset("transformer", "dit-xl-2-256").config, out_channels=4),
        schedule=FlowSchedule(time_scale=1000.0),
        prediction_type="flow_prediction",
        caption_dropout=0.1,
        sample_guidance_scale=4.0,
        sample_steps=50,
    ),
    data=DataConfig(kind="latents", path="data/latents-256"),
    optimiser=OptimiserConfig(
        learning_rate=1e-4, beta2=0.999, weight_decay=0.0, warmup_steps=5000, decay_fraction=0.0
    ),
    mesh=MeshConfig(fsdp=16),
    steps=400_000,
    batch_size=2048,
    dtype="bfloat16",
    ema=EMAConfig(decay=0.9999),
    checkpoint_every=5000,
    sample_every=10_000,
)
