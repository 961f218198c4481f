"""A model of classes instead of captions: one object, of 44 pairs of colour and shape.

    python benchmarks/designs.py classes runs/scenes_classes_images
    python -m jaxdiff cache-latents runs/scenes_decoder/export runs/scenes_classes_latents \
        --kind folder --path runs/scenes_classes_images --resolution 128
    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python train.py configs/scenes_classes.py --workdir runs/scenes_classes
    python generate.py "a red star" --model runs/scenes_classes/export

The UNet of the embedded model, whose context is the embedding of a class. Needs
runs/scenes_decoder/export, which configs/scenes_decoder.py makes.
"""

from jaxdiff.models.unet.class_conditional import ClassConditionalUNet2DConfig
from jaxdiff.scenes.specification import COLOURS, HELD_OUT_PAIRS, SHAPES
from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    EMAConfig,
    OptimiserConfig,
    TrainConfig,
)

NAMES = tuple(
    f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
    for colour in COLOURS
    for shape in SHAPES
    if (colour, shape) not in HELD_OUT_PAIRS
)

config = TrainConfig(
    objective=DiffusionObjective(
        vae="runs/scenes_decoder/export",
        class_names=NAMES,
        model=ClassConditionalUNet2DConfig(
            sample_size=8,
            in_channels=16,
            out_channels=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(128, 128),
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=128,
            attention_head_dim=4,
            use_linear_projection=True,
            time_embedding_dim=256,
            num_classes=len(NAMES),
        ),
        prediction_type="v_prediction",
        timestep_shift=2.5,
        sample_guidance_scale=3.0,
        num_eval_images=0,
    ),
    data=DataConfig(kind="latents", path="runs/scenes_classes_latents", validation_size=256),
    optimiser=OptimiserConfig(
        name="muon", learning_rate=2e-3, warmup_steps=200, decay_fraction=0.3
    ),
    steps=1_200,
    batch_size=128,
    ema=EMAConfig(decay=0.999),
    log_every=50,
    checkpoint_every=100,
    sample_every=600,
)
