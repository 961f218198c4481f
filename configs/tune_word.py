"""A new word for Stable Diffusion 1.5, learnt from a few images (textual inversion, 2208.01618).

    python train.py configs/tune_word.py --workdir runs/word --data.path IMAGES
    python generate.py "<thing> on a beach" --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --textual-inversion runs/word/export/learned_embeds.safetensors

IMAGES has images of one object; captions are not needed.
"""

from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    OptimiserConfig,
    TextualInversion,
    TrainConfig,
)

config = TrainConfig(
    objective=DiffusionObjective(
        pipeline="stable-diffusion-v1-5/stable-diffusion-v1-5",
        trainable=TextualInversion(
            placeholder_token="<thing>", initializer_token="toy", num_vectors=2
        ),
        caption_dropout=0.0,
    ),
    data=DataConfig(
        kind="folder",
        path="pictures",
        resolution=512,
        caption="a photo of <thing>",
        validation_size=1,
    ),
    optimiser=OptimiserConfig(learning_rate=5e-4, warmup_steps=0, weight_decay=0.0),
    steps=3_000,
    batch_size=4,
    dtype="bfloat16",
    sample_every=500,
)
