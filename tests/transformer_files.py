"""Small random models of the families of transformers, with what their files tell by shapes alone.

Heads are as wide as those of the published models, as no tensor shows their number.
"""

import dataclasses

import jax.numpy as jnp
import tiny

from jaxdiff.checkpoints import layout_parts
from jaxdiff.checkpoints.clip_vocabulary import END, clip_tokenizer
from jaxdiff.checkpoints.pipelines import read_pipeline
from jaxdiff.checkpoints.safetensors import read_table, read_tensor
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.chroma.config import ChromaTransformer2DConfig
from jaxdiff.models.chroma.module import ChromaTransformer2DModel
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.models.dit.config import DiTTransformer2DConfig
from jaxdiff.models.dit.module import DiTTransformer2DModel
from jaxdiff.models.flux.config import FluxTransformer2DConfig
from jaxdiff.models.flux.module import FluxTransformer2DModel
from jaxdiff.models.ldm_bert.config import LDMBertConfig
from jaxdiff.models.ldm_bert.module import LDMBertModel
from jaxdiff.models.sd3.config import SD3Transformer2DConfig
from jaxdiff.models.sd3.module import SD3Transformer2DModel
from jaxdiff.models.t5.config import T5Config
from jaxdiff.models.t5.module import T5EncoderModel
from jaxdiff.models.unet.class_conditional import (
    ClassConditionalUNet2DConfig,
    ClassConditionalUNet2DModel,
)
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.models.vq_model import VQModel, VQModelConfig

HEAD, WIDTH = 64, 192  # of CLIP's heads and of T5's states
NAMES = ("circle, disc", "square", "star")
STAGES = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "mid_block_add_attention": False,
}
VAE16 = AutoencoderKLConfig(
    **STAGES,
    latent_channels=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
    sample_size=1024,
)
VAE_SD3 = dataclasses.replace(VAE16, scaling_factor=1.5305, shift_factor=0.0609)
VAE4 = AutoencoderKLConfig(**STAGES, scaling_factor=0.18215, sample_size=256)
VQ = VQModelConfig(**STAGES, num_vq_embeddings=6, scaling_factor=1.0, sample_size=256)
TOKENS = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
FLUX = FluxTransformer2DConfig(
    **TOKENS,
    joint_attention_dim=WIDTH,
    pooled_projection_dim=HEAD,
    guidance_embeds=True,
    out_channels=64,
)
# Models of FLUX.1 that take more than the noisy latents: their class, and columns of tokens.
WIDER = {"fill": ("FluxFillPipeline", 384), "control": ("FluxControlPipeline", 128)}
VAE8 = dataclasses.replace(
    VAE16,
    block_out_channels=(32,) * 4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
CHROMA = ChromaTransformer2DConfig(
    **TOKENS,
    joint_attention_dim=WIDTH,
    approximator_num_channels=8,
    approximator_hidden_dim=12,
    approximator_layers=1,
    out_channels=64,
)
SD3 = SD3Transformer2DConfig(
    num_layers=2,
    num_attention_heads=1,
    joint_attention_dim=WIDTH,
    caption_projection_dim=HEAD,
    pooled_projection_dim=3 * HEAD,  # diffusers tells the CLIPs apart by their width
    pos_embed_max_size=8,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
DIT = DiTTransformer2DConfig(
    num_attention_heads=1,
    attention_head_dim=HEAD,
    num_layers=2,
    out_channels=8,
    sample_size=8,
    num_embeds_ada_norm=len(NAMES),
    freq_shift=0,  # as in its own code, which diffusers' differs from
    norm_eps=1e-6,
)
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
}
LDM = UNet2DConditionConfig(
    **BLOCKS, sample_size=32, attention_head_dim=8, cross_attention_dim=HEAD
)
CLASSES = ClassConditionalUNet2DConfig(
    **BLOCKS,
    sample_size=64,
    in_channels=3,
    out_channels=3,
    attention_head_dim=1,
    cross_attention_dim=6,
    num_classes=len(NAMES),
)
DDIM = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "trained_betas": None,
    "prediction_type": "epsilon",
}
LABELS = {"id2label": {str(i): name for i, name in enumerate(NAMES)}}


def _clip(seed, activation, heads=1, **options):
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=heads * HEAD,
        intermediate_size=16,
        projection_dim=heads * HEAD,
        num_hidden_layers=2,
        num_attention_heads=heads,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,
    )
    return tiny.random_component(CLIPTextModel, config, seed=seed, **options)


def _t5(words):
    config = T5Config(
        vocab_size=words,
        d_model=WIDTH,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return tiny.random_component(T5EncoderModel, config, seed=5)


def unprojected(component):
    """A CLIP whose projection is the identity, as that of CLIP-L in Stable Diffusion 3."""
    params = param_dict(component.module) | {"text_projection.kernel": jnp.eye(HEAD)}
    return dataclasses.replace(component, module=with_params(component.module, params))


def tied(component):
    """A DiT whose blocks have the same embedders, as the original code has one of each."""
    params = param_dict(component.module)
    first = "transformer_blocks.0.norm1.emb."
    for name, values in list(params.items()):
        if name.startswith(first):
            params[name.replace(".0.", ".1.", 1)] = values
    return dataclasses.replace(component, module=with_params(component.module, params))


def components(name, folder):
    """The pipeline of a family, by the name of one of its published models."""
    if name in WIDER:
        class_name, columns = WIDER[name]
        parts = components("flux", folder)
        config = dataclasses.replace(FLUX, in_channels=columns)
        wider = {
            "transformer": tiny.random_component(FluxTransformer2DModel, config),
            "vae": tiny.random_component(AutoencoderKL, VAE8, seed=1),
        }
        own = {**parts.components, **wider}
        return dataclasses.replace(parts, class_name=class_name, components=own)
    plain = read_pipeline(tiny.write_tiny(folder / "sd"))
    words = plain.components["text_encoder"].module.config.vocab_size
    made = FAMILIES[name](words, plain.tokenizers["tokenizer"])
    return dataclasses.replace(plain, absent=(), defaults={}, **made)


def _flux(words, tokenizer):
    return {
        "class_name": "FluxPipeline",
        "components": {
            "transformer": tiny.random_component(FluxTransformer2DModel, FLUX),
            "vae": tiny.random_component(AutoencoderKL, VAE16, seed=1),
            "text_encoder": _clip(2, "quick_gelu"),
            "text_encoder_2": _t5(words),
        },
        "tokenizers": {"tokenizer": clip_tokenizer(END), "tokenizer_2": tokenizer},
        "scheduler": layout_parts.flow_scheduler(3.0, dynamic=True),
    }


def _chroma(words, tokenizer):
    return {
        "class_name": "ChromaPipeline",
        "components": {
            "transformer": tiny.random_component(ChromaTransformer2DModel, CHROMA),
            "vae": tiny.random_component(AutoencoderKL, VAE16, seed=1),
            "text_encoder": _t5(words),
        },
        "tokenizers": {"tokenizer": tokenizer},
        "scheduler": layout_parts.flow_scheduler(3.0, dynamic=True),
    }


def _sd3(words, tokenizer):
    clip_l = _clip(2, "quick_gelu", with_projection=True)
    return {
        "class_name": "StableDiffusion3Pipeline",
        "components": {
            "transformer": tiny.random_component(SD3Transformer2DModel, SD3),
            "vae": tiny.random_component(AutoencoderKL, VAE_SD3, seed=1),
            "text_encoder": unprojected(clip_l),
            "text_encoder_2": _clip(3, "gelu", heads=2, with_projection=True),
            "text_encoder_3": _t5(words),
        },
        "tokenizers": {
            "tokenizer": clip_tokenizer(END),
            "tokenizer_2": clip_tokenizer("!"),
            "tokenizer_3": tokenizer,
        },
        "scheduler": layout_parts.flow_scheduler(3.0, dynamic=False),
    }


def _dit(words, tokenizer):
    del words, tokenizer
    return {
        "class_name": "DiTPipeline",
        "components": {
            "transformer": tied(tiny.random_component(DiTTransformer2DModel, DIT)),
            "vae": tiny.random_component(AutoencoderKL, VAE4, seed=1),
        },
        "tokenizers": {},
        "scheduler": DDIM | {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        "options": LABELS,
    }


def _ldm(words, tokenizer):
    bert = LDMBertConfig(
        vocab_size=words,
        encoder_layers=2,
        encoder_ffn_dim=16,
        encoder_attention_heads=1,
        d_model=HEAD,
    )
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return {
        "class_name": "LDMTextToImagePipeline",
        "components": {
            "unet": tiny.random_component(UNet2DConditionModel, LDM),
            "vqvae": tiny.random_component(AutoencoderKL, VAE4, seed=1),
            "bert": tiny.random_component(LDMBertModel, bert, seed=2),
        },
        "tokenizers": {"tokenizer": tokenizer},
        "scheduler": DDIM | betas,
    }


def _classes(words, tokenizer):
    del words, tokenizer
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    return {
        "class_name": "LDMClassConditionalPipeline",
        "components": {
            "unet": tiny.random_component(ClassConditionalUNet2DModel, CLASSES),
            "vqvae": tiny.random_component(VQModel, VQ, seed=1),
        },
        "tokenizers": {},
        "scheduler": DDIM | betas,
        "options": LABELS,
    }


# The parts of a pipeline, from the vocabulary's size and the tokenizer of a tiny one.
FAMILIES = {
    "flux": _flux,
    "chroma": _chroma,
    "sd3": _sd3,
    "dit": _dit,
    "ldm": _ldm,
    "classes": _classes,
}


def arrays(path):
    """The arrays of a file by name."""
    return {name: read_tensor(entry) for name, entry in read_table(path).items()}
