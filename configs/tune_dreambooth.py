"""One dog among dogs: all of Stable Diffusion 1.5 but its VAE, with a prior (2208.12242).

    python generate.py "a photo of a dog" --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --num-images 200 --output dogs
    python train.py configs/tune_dreambooth.py --workdir runs/dog --data.path IMAGES
    python generate.py "a photo of sks dog in a bucket" --model runs/dog/export

IMAGES has a few images of the dog, `dogs` images of any dogs, which make half of each batch.
"""

from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    Full,
    OptimiserConfig,
    TrainConfig,
)

config = TrainConfig(
    objective=DiffusionObjective(
        pipeline="stable-diffusion-v1-5/stable-diffusion-v1-5",
        trainable=Full(text_encoders=True),
        prior_data=DataConfig(
            kind="folder",
            path="dogs",
            resolution=512,
            caption="a photo of a dog",
            validation_size=1,
        ),
        caption_dropout=0.0,
        remat="blocks",
    ),
    data=DataConfig(
        kind="folder",
        path="pictures",
        resolution=512,
        caption="a photo of sks dog",
        validation_size=1,
    ),
    optimiser=OptimiserConfig(learning_rate=2e-6, warmup_steps=0, decay_fraction=0),
    steps=800,
    batch_size=4,
    dtype="bfloat16",
    sample_every=200,
)
