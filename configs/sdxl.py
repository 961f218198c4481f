"""Stable Diffusion XL's UNet from scratch, on cached 1024x1024 latents.

    hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir \
        stabilityai/stable-diffusion-xl-base-1.0
    python -m jaxdiff cache-latents ...                                   # docs/data.md
    python train.py configs/sdxl.py --workdir runs/sdxl                   # 256 chips
    python train.py configs/sdxl.py --plan v5e:16x16 v6e:16x16            # without any

As configs/sd15.py, but for the network, two text encoders and the sizes of pictures that it is
told. VAE and text encoders are the repository's, which the UNet's weights are not read from. Mesh
and batch of other machines:

| machine | options | state on a device |
|---|---|---|
| v5e-256, v6e-256 | (as below: data 8, fsdp 32) | 1.28 GB |
| v5p-128 | --mesh.fsdp 8 --batch-size 1024 | 5.14 GB |
| 8 x H200 | --mesh.fsdp 8 --batch-size 128 | 5.14 GB |

The state is 16 bytes of each of 2,567,463,684 parameters, over fsdp (computed, not measured);
the text encoders, 1.64 GB in bfloat16, and activations come on top, which `remat` keeps small at a
third more work. 8 pictures a chip do not fit a v5e: of 15.75 GiB they take 16.22 with
`--plan v5e:16x16 --batch-size 2048 --mesh.fsdp 64`.
"""

from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    EMAConfig,
    Full,
    MeshConfig,
    OptimiserConfig,
    TrainConfig,
)

config = TrainConfig(
    objective=DiffusionObjective(
        pipeline="stabilityai/stable-diffusion-xl-base-1.0",
        train=Full(from_scratch=True),
        caption_dropout=0.05,
        caption_dropout_each=(0.1, 0.1),
        remat="blocks",
    ),
    data=DataConfig(kind="latents", path="data/latents-1024"),
    optimiser=OptimiserConfig(learning_rate=1e-4, beta2=0.999, warmup_steps=10_000),
    mesh=MeshConfig(fsdp=32),
    steps=500_000,
    batch_size=1024,
    dtype="bfloat16",
    ema=EMAConfig(decay=0.9999),
    checkpoint_every=5000,
    sample_every=10_000,
)
