"""Pipeline folders between diffusers and jaxdiff: same values and outputs in both directions."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from copier import agree, image, nchw, randomise
from diffusers import AutoencoderKL, UNet2DConditionModel
from families import FAMILIES, LENGTH, pipeline, text_encoder
from flax import nnx
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionConfig

from jaxdiff.checkpoints.components import Component, read_component, write_component
from jaxdiff.checkpoints.key_mapping import path_to_torch_key, to_torch
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.models.build import param_dict

call = nnx.jit(lambda module, *inputs, **more: module(*inputs, **more))
encode = nnx.jit(lambda vae, images: vae.encode(images))
decode = nnx.jit(lambda vae, z: vae.decode(z))


def values(module):
    """Our weights as PyTorch tensors, by key."""
    return {
        path_to_torch_key(path): torch.from_numpy(
            np.array(to_torch(np.asarray(array), path).astype(np.float32))
        )
        for path, array in param_dict(module).items()
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
    x = image((1, 8, 8, pipe.unet.config.in_channels))
    context = image((1, LENGTH, pipe.unet.config.cross_attention_dim))
    ours, theirs = {}, {}
    if "text_encoder_2" in components:
        pooled = image((1, 10))
        numbers = [64, 64, 0, 0, 64, 64] if "text_encoder" in components else [64, 64, 0, 0, 6]
        time_ids = np.array([numbers], np.float32)
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
        z = x[..., :4]
        agree(decode(vae, jnp.asarray(z)), pipe.vae.decode(nchw(z)).sample)
        pixels = image((1, 16, 16, 3))
        moments = pipe.vae.encode(nchw(pixels)).latent_dist
        agree(encode(vae, jnp.asarray(pixels))[0], moments.mean)


def modules(part):
    return isinstance(part, torch.nn.Module)


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request):
    return pipeline(request.param)


def test_folder_written_by_diffusers(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    parts = read_pipeline(tmp_path, jnp.float32)
    assert parts.class_name == type(pipe).__name__
    assert parts.scheduler["_class_name"] == type(pipe.scheduler).__name__
    assert parts.components.keys() == {n for n, m in pipe.components.items() if modules(m)}
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
        assert {a.dtype for a in param_dict(component.module).values()} == {expected}
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
    for name in parts.tokenizers:
        ids = [getattr(p, name)("abc de!").input_ids for p in (loaded, pipe)]
        assert ids[0] == ids[1]


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
