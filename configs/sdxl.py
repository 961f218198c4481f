"""Stable Diffusion XL's UNet from scratch, on cached 1024x1024 latents.

    hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir \
        stabilityai/stable-diffusion-xl-base-1.0
    python -m jaxdiff cache-latents stabilityai/stable-diffusion-xl-base-1.0 \
        data/latents-1024 --kind tars --path gs://BUCKET/tars --resolution 1024
    python train.py configs/sdxl.py --workdir runs/sdxl                   # 256 chips
    python train.py configs/sdxl.py --plan v5e:16x16 v6e:16x16            # without any

As configs/sd15.py, but for the network, two text encoders and time ids (image sizes and crops). The
VAE and the text encoders are the repository's; the UNet starts from random weights. `remat` keeps
activations small at a third more FLOPs. With the same mesh and batch, a step of
configs/tune_full.py is the same program. On other machines:

| machine | options |
|---|---|
| v5p-128, which is 64 chips | --mesh.fsdp 8 --batch-size 1024 |
| 8 x H200 | --mesh.fsdp 8 --batch-size 128, with XLA_CLIENT_MEM_FRACTION=.95 |

What `--plan` says with these and `--no-find-max-batch`, by libtpu 0.0.42.1 in 25 (v5p) to 49
minutes of a core (v5e, with jemalloc for its memory) and 16 to 21 GB:

v5e:16x16  256 chips, batch 2048 (8 a chip)
  memory       13.54 GiB of 15.75 GiB a chip: fits
    held       weights 0.16 GiB, ema 0.16 GiB, optimiser 0.31 GiB, frozen 0.03 GiB
    arguments 0.77 GiB, temporaries 12.28 GiB, code 0.49 GiB
  FLOPs        1.627e+14 of the model, 1.764e+14 by the compiler without kernels
  cycles       2042.7 M estimated + 386.2 M scheduled for kernels: 1619.2 ms at 1.5 GHz
  collectives  1057 all-gather 6.190 GiB, 54 all-reduce 9.529 GiB: 84.4 ms on the links
  step         1619.2 ms if all overlap, 1264.8 images/s
  utilisation  51.0% of the bfloat16 peak (48.5% if nothing overlaps)

v6e:16x16  256 chips, batch 2048 (8 a chip)
  memory       12.44 GiB of 31.24 GiB a chip: fits
    held       weights 0.16 GiB, ema 0.16 GiB, optimiser 0.31 GiB, frozen 0.03 GiB
    arguments 0.77 GiB, temporaries 11.28 GiB, code 0.39 GiB
  FLOPs        1.627e+14 of the model, 1.764e+14 by the compiler without kernels
  cycles       943.0 M estimated + 294.1 M scheduled for kernels: 706.9 ms at 1.75 GHz
  collectives  1057 all-gather 6.190 GiB, 54 all-reduce 9.529 GiB: 37.7 ms on the links
  step         706.9 ms if all overlap, 2897.2 images/s
  utilisation  25.1% of the bfloat16 peak (23.8% if nothing overlaps)

v5p:4x4x4  64 chips, batch 1024 (16 a chip)
  memory       22.28 GiB of 95.73 GiB a chip: fits
    held       weights 1.20 GiB, ema 1.20 GiB, optimiser 2.40 GiB, frozen 0.19 GiB
    arguments 5.01 GiB, temporaries 16.75 GiB, code 0.51 GiB
  FLOPs        3.255e+14 of the model, 3.528e+14 by the compiler without kernels
  cycles       2285.0 M estimated + 400.3 M scheduled for kernels: 1534.5 ms at 1.75 GHz
  collectives  1057 all-gather 5.502 GiB, 53 all-reduce 9.417 GiB: 26.7 ms on the links
  step         1534.5 ms if all overlap, 667.3 images/s
  utilisation  46.2% of the bfloat16 peak (45.4% if nothing overlaps)

By jax-cuda13-plugin 0.10.2 in 9 minutes and 6 GB:

h200:8  8 GPUs, batch 128 (16 a GPU)
  memory       107.49 GiB of 133.95 GiB a GPU: fits
    held       weights 1.20 GiB, ema 1.20 GiB, optimiser 2.40 GiB, frozen 0.19 GiB
    arguments 5.00 GiB, temporaries 102.49 GiB, code 0.00 GiB
  FLOPs        3.255e+14 of the model
  collectives  382 all-gather 9.677 GiB, 189 all-reduce 8.371 GiB: 43.1 ms on the links
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
        trainable=Full(from_scratch=True),
        caption_dropout=0.05,
        caption_dropout_per_encoder=(0.1, 0.1),
        remat="blocks",
    ),
    data=DataConfig(kind="latents", path="data/latents-1024"),
    optimiser=OptimiserConfig(learning_rate=1e-4, beta2=0.999, warmup_steps=10_000),
    mesh=MeshConfig(fsdp=64),
    steps=500_000,
    batch_size=2048,
    dtype="bfloat16",
    ema=EMAConfig(decay=0.9999),
    checkpoint_every=5000,
    sample_every=10_000,
)
