"""All guidance rules with all families: what a network cannot serve is refused with the request."""

import dataclasses
import functools
import pathlib
import re
import tempfile

import cascade_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformer_files as models
import unclip_files

from jaxdiff.checkpoints.pipelines import read_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.families.registry import FAMILIES
from jaxdiff.guidance.base import RULES, WRAPPERS, parse
from jaxdiff.models.build import param_dict
from jaxdiff.models.pixart.config import PixArtTransformer2DConfig
from jaxdiff.models.pixart.module import PixArtTransformer2DModel
from jaxdiff.models.sd3.module import SD3Transformer2DModel
from jaxdiff.pipeline.pipeline import Pipeline

PIXART = PixArtTransformer2DConfig(
    num_attention_heads=1,
    attention_head_dim=8,
    num_layers=1,
    sample_size=8,
    cross_attention_dim=8,
    caption_channels=8,
    out_channels=4,
)
PIXELS = np.zeros((16, 16, 3), np.uint8)
NEEDED = {"control": {"image": PIXELS}, "fill": {"image": PIXELS, "mask": PIXELS[..., 0]}}


def deep(parts):
    """Stable Diffusion 3.5 with more blocks than a perturbed stream skips."""
    config = dataclasses.replace(models.SD3, num_layers=10)
    network = tiny.random_component(SD3Transformer2DModel, config)
    return dataclasses.replace(parts, components={**parts.components, "transformer": network})


def pixart(folder):
    parts = read_pipeline(tiny.write_tiny(folder / "sd"))
    network = tiny.random_component(PixArtTransformer2DModel, PIXART)
    own = {n: c for n, c in parts.components.items() if n != "unet"} | {"transformer": network}
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
    return dataclasses.replace(
        parts, components=own, class_name="PixArtCLIPPipeline", scheduler=flow, defaults={}
    )


MADE = {
    "sd": lambda folder: read_pipeline(tiny.write_tiny(folder / "sd")),
    "sd without attention": lambda folder: read_pipeline(
        tiny.write_tiny(folder / "sd", mid_block_type="UNetMidBlock2D")
    ),
    "sdxl": lambda folder: read_pipeline(tiny.write_xl(folder / "xl")),
    "sd3 with 10 blocks": lambda folder: deep(models.components("sd3", folder)),
    "pixart": pixart,
    "prior": cascade_files.prior,
    "karlo super-resolution": lambda folder: unclip_files.karlo(folder).stages()["super_res"],
    **{name: functools.partial(models.components, name) for name in (*models.FAMILIES, *NEEDED)},
}


PROMPTS = {"karlo super-resolution": ""}  # which reads none
SIZED = [name for name in MADE if name != "prior"]  # which generates no images


@functools.cache
def pipeline(name):
    with tempfile.TemporaryDirectory() as folder:
        parts = MADE[name](pathlib.Path(folder))
    return Pipeline(parts, name=name, devices=jax.devices()[:1])


def sentence_of_call(name, rule):
    """What the network says as it is traced for the streams of a rule; None if it runs."""
    return sentence_of_streams(name, any(stream.perturbed for stream in parse(rule).streams))


@functools.cache
def sentence_of_streams(name, perturbed):
    """The same for two streams, of which the second may be perturbed."""
    pipe, struct = pipeline(name), jax.ShapeDtypeStruct
    adapter = pipe.family.adapter(pipe.network, pipe.prediction_type)
    tokens = getattr(pipe.network.config, "num_embeddings", 16)
    shapes = adapter.conditioning_shapes((8, 8), tokens)
    cond = {n: struct((2, *s.shape), s.dtype) for n, s in shapes.items()}
    options = {"perturbed": jnp.array([False, True])} if perturbed else {}
    latents = pipe.codec.latent_shape(*(8 * pipe.codec.config.downscale,) * 2)
    x, t = struct((2, *latents), jnp.float32), struct((2,), jnp.float32)
    try:
        call = functools.partial(adapter, **options)
        jax.eval_shape(call, param_dict(adapter.module), x, t, cond)
    except InputError as error:
        return str(error)
    return None


def sentence_of_request(pipe, rule):
    """What a request with a rule says of perturbed streams; None if it does not."""
    options = NEEDED.get(pipe.name, {})
    options |= {"height": 16, "width": 16} if pipe.name in SIZED else {}
    try:
        pipe.resolve(PROMPTS.get(pipe.name, "1"), guidance=rule, **options)
    except InputError as error:
        return str(error) if "perturbed" in str(error) else None
    return None


@pytest.mark.parametrize("name", MADE)
def test_a_request_says_what_the_network_would(name):
    """The same sentence, with nothing compiled."""
    pipe = pipeline(name)
    rules = [*RULES, *(f"pag+{wrapper}" for wrapper in WRAPPERS), "pag:scale=0"]
    said = {rule: sentence_of_request(pipe, rule) for rule in rules}
    assert said == {rule: sentence_of_call(name, rule) for rule in rules}
    can = name in ("sd", "sdxl", "ldm", "classes", "sd3 with 10 blocks")
    assert {rule for rule in rules if said[rule]} == {r for r in rules if "pag" in r and not can}
    assert pipe.stages.compilations == 0


def test_all_networks_are_there():
    networks = {type(pipeline(name).network) for name in MADE}
    assert networks >= {family.network_class for family in FAMILIES}


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("side", ["height", "width"])
def test_sizes_are_refused_in_pixels(name, side):
    """By the VAE and the patches together, and never by the network, in latents."""
    pipe = pipeline(name)
    multiple = pipe.codec.config.downscale * pipe.family.latent_multiple
    sizes = {"height": 4 * multiple, "width": 4 * multiple}
    options = NEEDED.get(name, {}) | sizes
    (request,) = pipe.resolve(PROMPTS.get(pipe.name, "1"), **options)
    assert (request.height, request.width) == (4 * multiple,) * 2
    x = jax.ShapeDtypeStruct(
        (1, *(4 * pipe.family.latent_multiple,) * 2, pipe.codec.config.latent_channels), jnp.float32
    )
    adapter = pipe.family.adapter(pipe.network, pipe.prediction_type)
    shapes = adapter.conditioning_shapes(x.shape[1:3], 16)
    cond = {n: jax.ShapeDtypeStruct((1, *s.shape), s.dtype) for n, s in shapes.items()}
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    out = jax.eval_shape(adapter, param_dict(adapter.module), x, t, cond)
    assert out.shape[1:3] == x.shape[1:3]
    for wrong in (multiple + 1, multiple // 2 * 3):
        message = re.escape(f"{side}: got {wrong}, expected a multiple of {multiple} such as")
        with pytest.raises(InputError, match=f"^{message}"):
            pipe.resolve(PROMPTS.get(pipe.name, "1"), **options | {side: wrong})
