"""Small random diffusers pipelines of every family, written by diffusers itself."""

import diffusers
from copier import randomise
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
LENGTH = 7  # tokens of a text
END = "<|endoftext|>"
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp-2s": diffusers.DPMSolverSinglestepScheduler,
    "dpmpp-2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
OPTIONS = {"pndm": {"skip_prk_steps": True}, "dpmpp-2s": {"lower_order_final": True}}

TWO = {
    "down_block_types": (CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP),
    "block_out_channels": (8, 16),
    "cross_attention_dim": 12,
}
V2 = {
    **TWO,
    "attention_head_dim": (1, 4),
    "use_linear_projection": True,
    "upcast_attention": True,
}
XL = {
    "down_block_types": (DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, UP),
    "block_out_channels": (8, 16),
    "attention_head_dim": (1, 2),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
}
REFINER = {
    **XL,
    "cross_attention_dim": 12,
    "projection_class_embeddings_input_dim": 10 + 5 * 6,
}
OLD_TEXT = {"hidden_act": "quick_gelu", "eos_token_id": 2, "bos_token_id": 0}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDIM = DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
EULER = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
TRAILING = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="trailing")

# Family -> class, UNet, text encoder, scheduler.
FAMILIES = {
    "sd1": (
        diffusers.StableDiffusionPipeline,
        {**TWO, "attention_head_dim": 2},
        OLD_TEXT,
        DDIM,
    ),
    "sd2": (
        diffusers.StableDiffusionPipeline,
        V2,
        {"hidden_act": "gelu"},
        DDIMScheduler.from_config(DDIM.config, prediction_type="v_prediction"),
    ),
    "inpaint": (
        diffusers.StableDiffusionInpaintPipeline,
        {**TWO, "attention_head_dim": 2, "in_channels": 9},
        OLD_TEXT,
        DDIM,
    ),
    "turbo": (diffusers.StableDiffusionPipeline, V2, {"hidden_act": "gelu"}, TRAILING),
    "sdxl": (
        diffusers.StableDiffusionXLPipeline,
        {**XL, "cross_attention_dim": 24, "projection_class_embeddings_input_dim": 10 + 6 * 6},
        {"hidden_act": "quick_gelu"},
        EULER,
    ),
    "refiner": (diffusers.StableDiffusionXLImg2ImgPipeline, REFINER, None, EULER),
}
IMAGE_CLASSES = {
    "sd1": diffusers.StableDiffusionImg2ImgPipeline,
    "sd2": diffusers.StableDiffusionImg2ImgPipeline,
    "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "refiner": diffusers.StableDiffusionXLImg2ImgPipeline,
}
INPAINT_CLASSES = {
    "sd1": diffusers.StableDiffusionInpaintPipeline,
    "inpaint": diffusers.StableDiffusionInpaintPipeline,
    "sdxl": diffusers.StableDiffusionXLInpaintPipeline,
}


def text_encoder(cls, seed, **fields):
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        **{"projection_dim": 10, "eos_token_id": 39, "bos_token_id": 38} | fields,
    )
    return randomise(cls(config), seed)


def tokenizer(pad=END):
    tokens = [
        "!",
        *"abcdefghij",
        *(f"{c}</w>" for c in "abcdefghij"),
        "<|startoftext|>",
        END,
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH, pad_token=pad)


def pipeline(family):
    """A diffusers pipeline with small random parts."""
    cls, unet, text, scheduler = FAMILIES[family]
    common = {"norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.3,
    )
    parts = {
        "unet": randomise(UNet2DConditionModel(**common, **unet), 1),
        "vae": randomise(vae, 2),
        "scheduler": scheduler,
        "text_encoder": None if text is None else text_encoder(CLIPTextModel, 3, **text),
        "tokenizer": None
        if text is None
        else tokenizer("!" if family == "sd2" else "<|endoftext|>"),
    }
    if "XL" in cls.__name__:
        return cls(
            **parts,
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, 4, hidden_act="gelu"),
            tokenizer_2=tokenizer("!"),
            force_zeros_for_empty_prompt=family == "sdxl",
            **({"requires_aesthetics_score": True} if family == "refiner" else {}),
        )
    return cls(
        **parts,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def as_class(pipe, cls, sampler=None):
    """`pipe`'s parts in another class, with the scheduler that stands for `sampler`."""
    parts = {n: p for n, p in pipe.components.items() if n not in ("image_encoder",)}
    if sampler is not None:
        parts["scheduler"] = SCHEDULERS[sampler].from_config(
            pipe.scheduler.config, clip_sample=False, **OPTIONS.get(sampler, {})
        )
    options = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    if "XL" in cls.__name__:
        options["force_zeros_for_empty_prompt"] = pipe.config.force_zeros_for_empty_prompt
        if "requires_aesthetics_score" in pipe.config:
            options["requires_aesthetics_score"] = pipe.config.requires_aesthetics_score
    made = cls(**parts, **options)
    made.set_progress_bar_config(disable=True)
    return made
