"""A style for Stable Diffusion 3.5 medium as a LoRA, on latents and cached text states.

    python -m jaxdiff cache-latents MODEL LATENTS --kind folder --path IMAGES --resolution 1024 \
        --dtype bfloat16 --texts embeddings
    python train.py configs/tune_sd35_lora.py --workdir runs/sd35-lora \
        --objective.pipeline MODEL --data.path LATENTS
    python generate.py "..." --model MODEL \
        --lora runs/sd35-lora/export/pytorch_lora_weights.safetensors

MODEL is the folder of stabilityai/stable-diffusion-3.5-medium. IMAGES has captioned images in a
layout of docs/data.md. The transformer's weights are frozen, in bfloat16; on several devices
`--mesh.data 1 --mesh.fsdp -1` shares them. diffusers reads the result too.
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
        pipeline="stabilityai/stable-diffusion-3.5-medium",
        trainable=LoRA(rank=16),
        timestep_sampling="logit_normal",
        caption_dropout=0.05,
        sample_guidance_scale=4.5,
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
