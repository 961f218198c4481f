"""Stable Diffusion 2.1's UNet from scratch at 768x768, predicting v, on cached latents.

    hf download stabilityai/stable-diffusion-2-1 --local-dir stabilityai/stable-diffusion-2-1
    python -m jaxdiff cache-latents ...                                   # docs/data.md
    python train.py configs/sd21.py --workdir runs/sd21                   # 256 chips
    python train.py configs/sd21.py --plan v5e:16x16 v6e:16x16            # without any

As configs/sd15.py, but for the network: heads of 64 channels, 9216 tokens at the first level and
2.7 times the work for a picture. Mesh and batch of other machines:

| machine | options | state on a device |
|---|---|---|
| v5e-256, v6e-256 | (as below: data 16, fsdp 16) | 0.87 GB |
| v5p-128 | --mesh.fsdp 8 | 1.73 GB |
| 8 x H200 | --mesh.fsdp 1 --batch-size 256 | 13.9 GB |

The state is 16 bytes of each of 865,910,724 parameters, over fsdp (computed, not measured);
activations come on top, of which `remat` computes norms and activations again. A step is 6.49
TFLOPs of the model for each picture (`--plan` says what is counted). Only what follows has
been compiled. What the command above said with `--no-largest`, by libtpu 0.0.52 in 54 minutes of a
core and 12 GB:

v5e:16x16  256 chips, batch 2048 (8 a chip)
  memory       12.43 GiB of 15.75 GiB a chip: fits
    held       weights 0.20 GiB, ema 0.20 GiB, optimiser 0.41 GiB, frozen 0.04 GiB
    arguments 0.87 GiB, temporaries 11.11 GiB, code 0.46 GiB
  FLOPs        5.191e+13 of the model, 4.233e+13 by the compiler without kernels
  cycles       649.5 M estimated + 225.6 M scheduled for kernels: 583.4 ms at 1.5 GHz
  collectives  422 all-gather 2.105 GiB, 20 all-reduce 3.214 GiB: 28.6 ms on the links
  step         583.4 ms if all overlap, 3510.4 images/s
  utilisation  45.2% of the bfloat16 peak (43.1% if nothing overlaps)
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
