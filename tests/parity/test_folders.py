"""Pipeline folders between diffusers and jaxdiff: same values and outputs in both directions."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from copier import agree, image, nchw, randomise
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from flax import nnx
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from jaxdiff.checkpoints.components import Component, read_component, write_component
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.checkpoints.rules import to_key, to_torch
from jaxdiff.models.build import weights

DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
LENGTH = 7  # tokens of a text

call = nnx.jit(lambda module, *inputs, **more: module(*inputs, **more))
encode = nnx.jit(lambda vae, images: vae.encode(images))
decode = nnx.jit(lambda vae, z: vae.decode(z))

FAMILIES = {
    "sd1": {
        "unet": {
            "down_block_types": (CROSS_DOWN, DOWN),
            "up_block_types": (UP, CROSS_UP),
            "block_out_channels": (8, 16),
            "attention_head_dim": 2,
            "cross_attention_dim": 12,
        },
        "text": {"hidden_act": "quick_gelu", "eos_token_id": 2, "bos_token_id": 0},
    },
    "sd2": {
        "unet": {
            "down_block_types": (CROSS_DOWN, DOWN),
            "up_block_types": (UP, CROSS_UP),
            "block_out_channels": (8, 16),
            "attention_head_dim": (1, 4),
            "cross_attention_dim": 12,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "text": {"hidden_act": "gelu"},
    },
    "sdxl": {
        "unet": {
            "down_block_types": (DOWN, CROSS_DOWN),
            "up_block_types": (CROSS_UP, UP),
            "block_out_channels": (8, 16),
            "attention_head_dim": (1, 2),
            "transformer_layers_per_block": (1, 2),
            "cross_attention_dim": 24,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 6,
            "projection_class_embeddings_input_dim": 10 + 6 * 6,
        },
        "text": {"hidden_act": "quick_gelu"},
    },
}


def text_encoder(cls, seed, **fields):
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=24,
        projection_dim=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        **{"eos_token_id": 39, "bos_token_id": 38} | fields,
    )
    return randomise(cls(config), seed)


def tokenizer():
    tokens = [
        *"abcdefghij",
        *(f"{c}</w>" for c in "abcdefghij"),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def pipeline(family):
    """A diffusers pipeline with small random parts."""
    fields = FAMILIES[family]
    common = {"norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.3,
    )
    parts = {
        "unet": randomise(UNet2DConditionModel(**common, **fields["unet"]), 1),
        "vae": randomise(vae, 2),
        "text_encoder": text_encoder(CLIPTextModel, 3, **fields["text"]),
        "tokenizer": tokenizer(),
    }
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, 4, hidden_act="gelu"),
            tokenizer_2=tokenizer(),
            scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        )
    return diffusers.StableDiffusionPipeline(
        **parts,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def values(module):
    """Our weights as PyTorch tensors, by key."""
    return {
        to_key(path): torch.from_numpy(
            np.array(to_torch(np.asarray(array), path).astype(np.float32))
        )
        for path, array in weights(module).items()
    }


def public(config):
    """A scheduler's settings without diffusers' own notes on them."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def assert_same_values(ours, theirs):
    """Bit for bit, whether or not transformers drops the prefix of text models."""
    ours = {key.removeprefix("text_model."): tensor for key, tensor in values(ours).items()}
    theirs = {key.removeprefix("text_model."): t for key, t in theirs.state_dict().items()}
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor.float()), key


def assert_same_outputs(parts, pipe):
    """Text, UNet and VAE in float32."""
    components = {name: component.module for name, component in parts.components.items()}
    ids = np.array([[38, 3, 5, 9, 39, 39, 39]], np.int32)
    x = image((1, 8, 8, 4))
    context = image((1, LENGTH, pipe.unet.config.cross_attention_dim))
    ours, theirs = {}, {}
    if "text_encoder_2" in components:
        pooled = image((1, 10))
        time_ids = np.array([[64, 64, 0, 0, 64, 64]], np.float32)
        ours = {"text_embeds": jnp.asarray(pooled), "time_ids": jnp.asarray(time_ids)}
        theirs = {"text_embeds": torch.tensor(pooled), "time_ids": torch.tensor(time_ids)}
    with torch.no_grad():
        for name in (n for n in components if n.startswith("text_encoder")):
            expected = getattr(pipe, name)(torch.tensor(ids)).last_hidden_state
            agree(call(components[name], jnp.asarray(ids)), expected)
        expected = pipe.unet(
            nchw(x), torch.tensor([500]), torch.tensor(context), added_cond_kwargs=theirs
        ).sample
        inputs = jnp.asarray(x), jnp.array([500]), jnp.asarray(context)
        got = call(components["unet"], *inputs, **ours)
        agree(got, expected)
        vae = components["vae"]
        agree(decode(vae, jnp.asarray(x)), pipe.vae.decode(nchw(x)).sample)
        pixels = image((1, 16, 16, 3))
        moments = pipe.vae.encode(nchw(pixels)).latent_dist
        agree(encode(vae, jnp.asarray(pixels))[0], moments.mean)


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request):
    return pipeline(request.param)


def test_folder_written_by_diffusers(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    parts = read_pipeline(tmp_path, jnp.float32)
    assert parts.class_name == type(pipe).__name__
    assert parts.scheduler["_class_name"] == type(pipe.scheduler).__name__
    for name, component in parts.components.items():
        assert_same_values(component.module, getattr(pipe, name))
    assert_same_outputs(parts, pipe)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "variant": "fp16"},
        {"max_shard_size": "20KB"},
        {"max_shard_size": "20KB", "variant": "fp16"},
    ],
    ids=str,
)
def test_files_as_diffusers_writes_them(tmp_path, options):
    pipe = pipeline("sd1")
    dtype = options.pop("dtype", torch.float32)
    pipe.to(dtype).save_pretrained(tmp_path, **options)
    if "max_shard_size" in options:
        assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 2
    parts = read_pipeline(tmp_path)
    expected = jnp.dtype(str(dtype).removeprefix("torch."))
    for name, component in parts.components.items():
        assert {a.dtype for a in weights(component.module).values()} == {expected}
        assert_same_values(component.module, getattr(pipe, name))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_folder_written_here_loads_in_diffusers(pipe, tmp_path, dtype):
    pipe.save_pretrained(tmp_path / "theirs")
    parts = read_pipeline(tmp_path / "theirs", jnp.dtype(dtype))
    write_pipeline(tmp_path / "ours", parts)
    loaded = type(pipe).from_pretrained(tmp_path / "ours", dtype=getattr(torch, dtype))
    for name, component in parts.components.items():
        assert_same_values(component.module, getattr(loaded, name))
        assert getattr(loaded, name).dtype == getattr(torch, dtype)
    if dtype == "float32":
        assert_same_outputs(parts, loaded)
        assert public(loaded.scheduler.config) == public(pipe.scheduler.config)
    assert loaded.tokenizer("abc de").input_ids == pipe.tokenizer("abc de").input_ids


def test_configs_made_here_load_in_diffusers(tmp_path):
    """Without the config.json that a component came with: trained here, say."""
    pipe = pipeline("sd1")
    pipe.save_pretrained(tmp_path / "theirs")
    parts = read_pipeline(tmp_path / "theirs", jnp.float32)
    for name, cls in (
        ("unet", UNet2DConditionModel),
        ("vae", AutoencoderKL),
        ("text_encoder", CLIPTextModel),
    ):
        module = parts.components[name].module
        write_component(tmp_path / name, Component(module=module))
        loaded, report = cls.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report.values()), report
        assert_same_values(module, loaded)


@pytest.mark.parametrize(
    "cls",
    [
        transformers.CLIPModel,
        transformers.CLIPVisionModel,
        transformers.CLIPVisionModelWithProjection,
        CLIPTextModelWithProjection,
    ],
)
def test_clip_classes_in_both_directions(tmp_path, cls):
    text = text_encoder(CLIPTextModelWithProjection, 1).config
    vision = CLIPVisionConfig(
        hidden_size=12,
        intermediate_size=24,
        projection_dim=10,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    if cls is transformers.CLIPModel:
        config = transformers.CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=10
        )
    else:
        config = vision if "Vision" in cls.__name__ else text
    theirs = randomise(cls(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = read_component(tmp_path / "theirs")
    assert_same_clip(ours.module, theirs)
    for name, component in (("kept", ours), ("made", Component(module=ours.module))):
        write_component(tmp_path / name, component)
        assert_same_clip(ours.module, cls.from_pretrained(tmp_path / name))


def assert_same_clip(ours, theirs):
    bare = {k.removeprefix("vision_model."): k for k in values(ours)}
    expected = {k.removeprefix("vision_model."): t for k, t in theirs.state_dict().items()}
    if len(bare) < len(values(ours)):  # CLIPModel has two towers and keeps both prefixes
        bare, expected = {k: k for k in values(ours)}, theirs.state_dict()
    assert bare.keys() == expected.keys()
    got = values(ours)
    for key, name in bare.items():
        assert torch.equal(got[name], expected[key]), key
