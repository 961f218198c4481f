"""Stable Diffusion 1.5's UNet from scratch, on cached 512x512 latents.

    hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir \
        stable-diffusion-v1-5/stable-diffusion-v1-5
    python -m jaxdiff cache-latents ...                                   # docs/data.md
    python train.py configs/sd15.py --workdir runs/sd15                   # 256 chips
    python train.py configs/sd15.py --plan v5e:16x16 v6e:16x16            # without any

The VAE and the text encoder stay as they are: latents are read from the cache, captions are
encoded in every step. Weights, averages and moments are float32, split over `mesh.fsdp` devices and
the same in every group of them; the network computes in bfloat16. A TPU wants 8 pictures a chip or
a multiple of it (docs/training.md). Mesh and batch of other machines:

| machine | options | state on a device |
|---|---|---|
| v5e-256, v6e-256 | (as below: data 16, fsdp 16) | 0.86 GB |
| v5p-128 | --mesh.fsdp 8 | 1.72 GB |
| 8 x H200 | --mesh.fsdp 1 --batch-size 1024 | 13.8 GB |

The state is 16 bytes of each of 859,520,964 parameters, over fsdp (computed, not measured). Nothing
is computed again: of activations a chip of v5e holds 8 pictures and an H200 128 of them. A step is
2.42 TFLOPs of the model for each picture (`--plan` says what is counted). What the command above
says with `--no-largest`, by libtpu 0.0.42.1 in 37 minutes of a core and 15 GB:

v5e:16x16  256 chips, batch 2048 (8 a chip)
  memory       8.95 GiB of 15.75 GiB a chip: fits
    held       weights 0.20 GiB, ema 0.20 GiB, optimiser 0.40 GiB, frozen 0.01 GiB
    arguments 0.83 GiB, temporaries 7.77 GiB, code 0.35 GiB
  FLOPs        1.936e+13 of the model, 1.588e+13 by the compiler without kernels
  cycles       245.0 M estimated + 60.6 M scheduled for kernels: 203.7 ms at 1.5 GHz
  collectives  356 all-gather 1.715 GiB, 20 all-reduce 3.190 GiB: 26.3 ms on the links
  step         203.7 ms if all overlap, 10051.9 images/s
  utilisation  48.2% of the bfloat16 peak (42.7% if nothing overlaps)

And by libtpu 0.0.52, which is newer than JAX 0.10.2 is made for:

v6e:16x16  256 chips, batch 2048 (8 a chip)
  memory       8.83 GiB of 31.24 GiB a chip: fits
    held       weights 0.20 GiB, ema 0.20 GiB, optimiser 0.40 GiB, frozen 0.01 GiB
    arguments 0.83 GiB, temporaries 7.25 GiB, code 0.75 GiB
  FLOPs        1.936e+13 of the model, 1.588e+13 by the compiler without kernels
  cycles       114.8 M estimated + 45.3 M scheduled for kernels: 91.5 ms at 1.75 GHz
  collectives  356 all-gather 1.715 GiB, 20 all-reduce 3.190 GiB: 11.8 ms on the links
  step         91.5 ms if all overlap, 22388.9 images/s
  utilisation  23.1% of the bfloat16 peak (20.4% if nothing overlaps)

One H200 with 128 pictures takes 828 ms for a step, 37.8% of its peak (docs/training.md).
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
