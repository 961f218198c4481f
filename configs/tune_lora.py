"""A style or a subject for Stable Diffusion 1.5 as a LoRA of a few megabytes.

    python train.py configs/tune_lora.py --workdir runs/lora --data.path IMAGES
    python generate.py "..." --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --lora runs/lora/export/pytorch_lora_weights.safetensors

IMAGES has captioned images in a layout of docs/data.md. diffusers reads the result too.
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
        pipeline="stable-diffusion-v1-5/stable-diffusion-v1-5",
        trainable=LoRA(rank=16),
        caption_dropout=0.05,
        remat="blocks",
    ),
    data=DataConfig(kind="folder", path="pictures", resolution=512, flip=True),
    optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=100),
    steps=2_000,
    batch_size=8,
    dtype="bfloat16",
    checkpoint_every=500,
    sample_every=500,
)
