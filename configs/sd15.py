"""Stable Diffusion 1.5's UNet from scratch, on cached 512x512 latents.

    hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir \
        stable-diffusion-v1-5/stable-diffusion-v1-5
    python -m jaxdiff cache-latents stable-diffusion-v1-5/stable-diffusion-v1-5 \
        data/latents-512 --kind tars --path gs://BUCKET/tars --resolution 512
    python train.py configs/sd15.py --workdir runs/sd15                   # 256 chips
    python train.py configs/sd15.py --plan v5e:16x16 v6e:16x16            # without any

The VAE and the text encoder are frozen: latents are read from the cache, captions are encoded in
every step. Weights, EMA and optimiser state are float32, sharded over `mesh.fsdp` devices and
replicated over groups of them. The network computes in bfloat16, without rematerialisation. TPUs
are fastest with a multiple of 8 images per chip (docs/training.md). On other machines:

| machine | options |
|---|---|
| v5p-128, which is 64 chips | --mesh.fsdp 8 |
| 8 x H200 | --mesh.fsdp 1 --batch-size 1024, with XLA_CLIENT_MEM_FRACTION=.95 |

What `--plan` says with these and `--no-find-max-batch`, by libtpu 0.0.42.1 in 17 (v5p) to 37
minutes of a core and 15 to 16 GB:

v5e:16x16  256 chips, batch 2048 (8 a chip)
  memory       8.95 GiB of 15.75 GiB a chip: fits
    held       weights 0.20 GiB, ema 0.20 GiB, optimiser 0.40 GiB, frozen 0.01 GiB
    arguments 0.83 GiB, temporaries 7.77 GiB, code 0.35 GiB
  FLOPs        1.936e+13 of the model, 1.588e+13 by the compiler without kernels
  cycles       245.0 M estimated + 60.6 M scheduled for kernels: 203.7 ms at 1.5 GHz
  collectives  356 all-gather 1.715 GiB, 20 all-reduce 3.190 GiB: 26.3 ms on the links
  step         203.7 ms if all overlap, 10051.9 images/s
  utilisation  48.2% of the bfloat16 peak (42.7% if nothing overlaps)

v5p:4x4x4  64 chips, batch 2048 (32 a chip)
  memory       26.84 GiB of 95.73 GiB a chip: fits
    held       weights 0.40 GiB, ema 0.40 GiB, optimiser 0.80 GiB, frozen 0.03 GiB
    arguments 1.65 GiB, temporaries 24.37 GiB, code 0.82 GiB
  FLOPs        7.744e+13 of the model, 6.351e+13 by the compiler without kernels
  cycles       506.2 M estimated + 123.7 M scheduled for kernels: 359.9 ms at 1.75 GHz
  collectives  356 all-gather 1.601 GiB, 20 all-reduce 3.153 GiB: 8.5 ms on the links
  step         359.9 ms if all overlap, 5689.8 images/s
  utilisation  46.9% of the bfloat16 peak (45.8% if nothing overlaps)

v6e:16x16  256 chips, batch 2048 (8 a chip)
  memory       9.11 GiB of 31.24 GiB a chip: fits
    held       weights 0.20 GiB, ema 0.20 GiB, optimiser 0.40 GiB, frozen 0.01 GiB
    arguments 0.83 GiB, temporaries 7.55 GiB, code 0.73 GiB
  FLOPs        1.936e+13 of the model, 1.588e+13 by the compiler without kernels
  cycles       115.1 M estimated + 45.5 M scheduled for kernels: 91.7 ms at 1.75 GHz
  collectives  356 all-gather 1.715 GiB, 20 all-reduce 3.190 GiB: 11.8 ms on the links
  step         91.7 ms if all overlap, 22324.2 images/s
  utilisation  23.0% of the bfloat16 peak (20.4% if nothing overlaps)

By jax-cuda13-plugin 0.10.2 without `--no-find-max-batch`, in 8 minutes of a core and 5 GB:

h200:8  8 GPUs, batch 1024 (128 a GPU)
  memory       110.85 GiB of 133.95 GiB a GPU: fits
    held       weights 3.20 GiB, ema 3.20 GiB, optimiser 6.40 GiB, frozen 0.23 GiB
    arguments 13.05 GiB, temporaries 97.80 GiB, code 0.00 GiB
  FLOPs        3.098e+14 of the model
  collectives  66 all-reduce 2.802 GiB: 6.7 ms on the links
  largest      batch 1184 (148 a GPU)

One H200 with 128 images takes 828 ms for a step, 37.8% of its peak (docs/training.md).
"""

from jaxdiff.models.presets import preset
from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    EMAConfig,
    MeshConfig,
    OptimiserConfig,
    TrainConfig,
)

REPOSITORY = "stable-diffusion-v1-5/stable-diffusion-v1-5"

config = TrainConfig(
    objective=DiffusionObjective(
        vae=f"{REPOSITORY}/vae",
        text_encoder=REPOSITORY,
        model=preset("unet", "sd15").config,
        prediction_type="epsilon",
        remat="none",
    ),
    data=DataConfig(kind="latents", path="data/latents-512"),
    optimiser=OptimiserConfig(learning_rate=1e-4, beta2=0.999, warmup_steps=10_000),
    mesh=MeshConfig(fsdp=16),
    steps=500_000,
    batch_size=2048,
    dtype="bfloat16",
    ema=EMAConfig(decay=0.9999),
    checkpoint_every=5000,
    sample_every=10_000,
)
