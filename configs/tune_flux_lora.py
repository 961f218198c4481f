"""A style or a subject for FLUX.1 dev as a LoRA, on latents and cached text states.

    python -m jaxdiff cache-latents MODEL LATENTS --kind folder --path IMAGES --resolution 1024 \
        --dtype bfloat16 --texts embeddings
    python train.py configs/tune_flux_lora.py --workdir runs/flux-lora \
        --objective.pipeline MODEL --data.path LATENTS
    python generate.py "..." --model MODEL \
        --lora runs/flux-lora/export/pytorch_lora_weights.safetensors

MODEL is the folder of black-forest-labs/FLUX.1-dev. IMAGES has captioned images in a layout of
docs/data.md. The transformer's weights, 24 GB in bfloat16, are frozen; on several devices
`--mesh.data 1 --mesh.fsdp -1` shares them. The network takes the guidance scale 1 while it is
trained, as that of images which no guidance has made; generate at 3.5 as before. diffusers reads
the result too.
"""

from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    LoRA,
    OptimiserConfig,
    TrainConfig,
)

config = TrainConfig(
    objective=DiffusionObjective(
        pipeline="black-forest-labs/FLUX.1-dev",
        trainable=LoRA(rank=16),
        timestep_sampling="logit_normal",
        timestep_shift_by_resolution=True,
        distilled_guidance_scale=1.0,
        caption_dropout=0.05,
        sample_guidance_scale=3.5,
        remat="blocks",
    ),
    data=DataConfig(kind="latents", path="latents"),
    optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=100),
    steps=2_000,
    batch_size=8,
    dtype="bfloat16",
    checkpoint_every=500,
    sample_every=0,
)
