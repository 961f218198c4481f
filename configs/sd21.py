"""Stable Diffusion 2.1's UNet from scratch at 768x768, predicting v, on cached latents.

    hf download stabilityai/stable-diffusion-2-1 --local-dir stabilityai/stable-diffusion-2-1
    python -m jaxdiff cache-latents stabilityai/stable-diffusion-2-1 \
        data/latents-768 --kind tars --path gs://BUCKET/tars --resolution 768
    python train.py configs/sd21.py --workdir runs/sd21                   # 256 chips
    python train.py configs/sd21.py --plan v5e:16x16 v6e:16x16            # without any

As configs/sd15.py, but for the network: heads of 64 channels, 9216 tokens at the first level and
2.7 times the FLOPs per image; `remat` recomputes norms and activations. On other machines:

| machine | options |
|---|---|
| v5p-128, which is 64 chips | --mesh.fsdp 8 |
| 8 x H200 | --mesh.fsdp 1 --batch-size 256, with XLA_CLIENT_MEM_FRACTION=.95 |

What `--plan` says with these and `--no-find-max-batch`, by libtpu 0.0.42.1 in 23 (v5p) to 46
minutes (v6e) of a core and 15 to 18 GB:

v5e:16x16  256 chips, batch 2048 (8 a chip)
  memory       12.95 GiB of 15.75 GiB a chip: fits
    held       weights 0.20 GiB, ema 0.20 GiB, optimiser 0.41 GiB, frozen 0.04 GiB
    arguments 0.87 GiB, temporaries 11.62 GiB, code 0.46 GiB
  FLOPs        5.191e+13 of the model, 4.251e+13 by the compiler without kernels
  cycles       660.2 M estimated + 225.0 M scheduled for kernels: 590.1 ms at 1.5 GHz
  collectives  422 all-gather 2.105 GiB, 20 all-reduce 3.214 GiB: 28.6 ms on the links
  step         590.1 ms if all overlap, 3470.4 images/s
  utilisation  44.6% of the bfloat16 peak (42.6% if nothing overlaps)

v6e:16x16  256 chips, batch 2048 (8 a chip)
  memory       13.65 GiB of 31.24 GiB a chip: fits
    held       weights 0.20 GiB, ema 0.20 GiB, optimiser 0.41 GiB, frozen 0.04 GiB
    arguments 0.87 GiB, temporaries 12.39 GiB, code 0.39 GiB
  FLOPs        5.191e+13 of the model, 4.384e+13 by the compiler without kernels
  cycles       322.1 M estimated + 163.5 M scheduled for kernels: 277.5 ms at 1.75 GHz
  collectives  422 all-gather 2.105 GiB, 21 all-reduce 3.399 GiB: 13.2 ms on the links
  step         277.5 ms if all overlap, 7379.2 images/s
  utilisation  20.4% of the bfloat16 peak (19.4% if nothing overlaps)

v5p:4x4x4  64 chips, batch 2048 (32 a chip)
  memory       45.77 GiB of 95.73 GiB a chip: fits
    held       weights 0.40 GiB, ema 0.40 GiB, optimiser 0.81 GiB, frozen 0.08 GiB
    arguments 1.72 GiB, temporaries 43.05 GiB, code 1.01 GiB
  FLOPs        2.076e+14 of the model, 1.877e+14 by the compiler without kernels
  cycles       1450.8 M estimated + 463.4 M scheduled for kernels: 1093.8 ms at 1.75 GHz
  collectives  422 all-gather 1.965 GiB, 21 all-reduce 3.358 GiB: 9.5 ms on the links
  step         1093.8 ms if all overlap, 1872.3 images/s
  utilisation  41.4% of the bfloat16 peak (41.0% if nothing overlaps)

By jax-cuda13-plugin 0.10.2 in 2 minutes and 4 GB:

h200:8  8 GPUs, batch 256 (32 a GPU)
  memory       77.66 GiB of 133.95 GiB a GPU: fits
    held       weights 3.23 GiB, ema 3.23 GiB, optimiser 6.45 GiB, frozen 0.63 GiB
    arguments 13.55 GiB, temporaries 64.11 GiB, code 0.00 GiB
  FLOPs        2.076e+14 of the model
  collectives  66 all-reduce 2.823 GiB: 6.7 ms on the links
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

REPOSITORY = "stabilityai/stable-diffusion-2-1"

config = TrainConfig(
    objective=DiffusionObjective(
        vae=f"{REPOSITORY}/vae",
        text_encoder=REPOSITORY,
        model=preset("unet", "sd21").config,
        prediction_type="v_prediction",
        remat="products",
    ),
    data=DataConfig(kind="latents", path="data/latents-768"),
    optimiser=OptimiserConfig(learning_rate=1e-4, beta2=0.999, warmup_steps=10_000),
    mesh=MeshConfig(fsdp=16),
    steps=500_000,
    batch_size=2048,
    dtype="bfloat16",
    ema=EMAConfig(decay=0.9999),
    checkpoint_every=5000,
    sample_every=10_000,
)
