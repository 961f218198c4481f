"""The transformers of FLUX.1 and Chroma against diffusers, with small random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, compare_gradients, copy, image, nchw, randomise
from diffusers import ChromaTransformer2DModel, FluxPipeline, FluxTransformer2DModel
from flax import nnx

from jaxdiff.models.chroma.config import ChromaTransformer2DConfig
from jaxdiff.models.chroma.module import ChromaTransformer2DModel as OurChroma
from jaxdiff.models.flux.config import FluxTransformer2DConfig
from jaxdiff.models.flux.module import FluxTransformer2DModel as OurFlux

# of diffusers, which Chroma's class takes from where it was
pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed:FutureWarning")

TINY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "axes_dims_rope": (4, 4, 4),
}
FLUX = {**TINY, "pooled_projection_dim": 6}
CHROMA = {
    **TINY,
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 20,
    "approximator_layers": 2,
}
TIMES = np.array([999.0, 123.4], np.float32)
TEXT = image((2, 5, 10), seed=2)
POOLED = image((2, 6), seed=3)
# Sines of 1000 times these; of larger ones float32 has fewer digits than the tests ask for.
SCALES = np.array([1.0, 0.4], np.float32)


def both(cls, ours, config, **fields):
    theirs = randomise(cls(**fields))
    return theirs, copy(theirs, ours, config(**fields))


def run(module, x, **options):
    """Our network on the latents x."""
    arrays = jax.tree.map(jnp.asarray, (x, TIMES, TEXT, options))
    return jax.jit(lambda x, t, text, named: module(x, t, text, **named))(*arrays)


def slopes(module, weights, x, **options):
    """The gradient of the weighted sum of the outputs, as a module."""
    graph, state = nnx.split(module)

    def loss(state):
        return jnp.sum(weights * run(nnx.merge(graph, state), x, **options))

    return nnx.merge(graph, jax.grad(loss)(state))


def packed(x):
    """Latents as diffusers' pipelines pack them, and their ids."""
    b, h, w, c = x.shape
    tokens = FluxPipeline._pack_latents(nchw(x), b, c, h, w)
    return tokens, FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32)


def unpacked(tokens, h, w):
    """Tokens of h x w latents as latents, by diffusers' pipelines."""
    return FluxPipeline._unpack_latents(tokens, 8 * h, 8 * w, 8)


def call(theirs, x, reference=None, **options):
    """diffusers' network on the latents x, as its pipelines call it."""
    tokens, ids = packed(x)
    n = tokens.shape[1]
    if reference is not None:
        more, more_ids = packed(reference)
        more_ids[..., 0] = 1
        tokens, ids = torch.cat([tokens, more], dim=1), torch.cat([ids, more_ids])
    out = theirs(
        hidden_states=tokens,
        timestep=torch.from_numpy(TIMES) / 1000,
        encoder_hidden_states=torch.from_numpy(TEXT),
        txt_ids=torch.zeros(TEXT.shape[1], 3),
        img_ids=ids,
        **options,
    ).sample
    return unpacked(out[:, :n], *x.shape[1:3])


def call_flux(theirs, x, guidance=None, **options):
    scales = None if guidance is None else torch.from_numpy(guidance)
    pooled = torch.from_numpy(POOLED)
    return call(theirs, x, pooled_projections=pooled, guidance=scales, **options)


@pytest.mark.parametrize("size", [(4, 4), (6, 2), (2, 12)])
@pytest.mark.parametrize("guidance", [None, SCALES], ids=["plain", "guidance"])
def test_flux(guidance, size):
    fields = {**FLUX, "guidance_embeds": guidance is not None}
    theirs, ours = both(FluxTransformer2DModel, OurFlux, FluxTransformer2DConfig, **fields)
    x = image((2, *size, 4))
    got = run(ours, x, pooled_projections=POOLED, guidance=guidance)
    agree(got, call_flux(theirs, x, guidance))


def test_flux_gradients():
    fields = {**FLUX, "guidance_embeds": True}
    theirs, ours = both(FluxTransformer2DModel, OurFlux, FluxTransformer2DConfig, **fields)
    x, weights = image((2, 4, 6, 4)), image((2, 4, 6, 4), seed=9)
    (call_flux(theirs, x, SCALES) * nchw(weights)).sum().backward()
    compare_gradients(slopes(ours, weights, x, pooled_projections=POOLED, guidance=SCALES), theirs)


def test_channels_of_an_image_and_a_mask():
    """FLUX.1 Fill: tokens of noise, then of the masked image, then of the mask."""
    fields = {**FLUX, "in_channels": 16 + 16 + 64, "out_channels": 16, "guidance_embeds": True}
    theirs, ours = both(FluxTransformer2DModel, OurFlux, FluxTransformer2DConfig, **fields)
    parts = image((2, 4, 6, 4)), image((2, 4, 6, 4), seed=4), image((2, 4, 6, 16), seed=5)
    tokens, ids = torch.cat([packed(x)[0] for x in parts], dim=2), packed(parts[0])[1]
    want = theirs(
        hidden_states=tokens,
        timestep=torch.from_numpy(TIMES) / 1000,
        encoder_hidden_states=torch.from_numpy(TEXT),
        pooled_projections=torch.from_numpy(POOLED),
        guidance=torch.from_numpy(SCALES),
        txt_ids=torch.zeros(TEXT.shape[1], 3),
        img_ids=ids,
    ).sample
    got = run(ours, np.concatenate(parts, axis=-1), pooled_projections=POOLED, guidance=SCALES)
    agree(got, unpacked(want, 4, 6))


@pytest.mark.parametrize("size", [(4, 6), (6, 2)], ids=["same size", "another size"])
def test_reference(size):
    """FLUX.1 Kontext: tokens of a reference image behind those of the image."""
    fields = {**FLUX, "guidance_embeds": True}
    theirs, ours = both(FluxTransformer2DModel, OurFlux, FluxTransformer2DConfig, **fields)
    x, reference = image((2, 4, 6, 4)), image((2, *size, 4), seed=7)
    got = run(ours, x, pooled_projections=POOLED, guidance=SCALES, reference=reference)
    agree(got, call_flux(theirs, x, SCALES, reference=reference))


LENGTHS = {"some padding": (2, 3), "one token of padding": (4, 4), "none": (5, 5)}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("size", [(4, 4), (6, 2)])
def test_chroma(size, lengths):
    theirs, ours = both(ChromaTransformer2DModel, OurChroma, ChromaTransformer2DConfig, **CHROMA)
    x = image((2, *size, 4))
    positions, ends = np.arange(TEXT.shape[1]), np.array(lengths)[:, None]
    seen = np.concatenate([positions <= ends, np.ones((2, size[0] * size[1] // 4), bool)], axis=1)
    want = call(theirs, x, attention_mask=torch.from_numpy(seen))
    got = run(ours, x, context_mask=positions < ends)
    agree(got, want)
    if min(lengths) < 4:
        whole = run(ours, x, context_mask=np.ones((2, 5), bool))
        assert np.abs(np.asarray(got) - np.asarray(whole)).max() > 1e-3


def test_chroma_gradients():
    theirs, ours = both(ChromaTransformer2DModel, OurChroma, ChromaTransformer2DConfig, **CHROMA)
    x, weights = image((2, 4, 6, 4)), image((2, 4, 6, 4), seed=9)
    # with no row without a key, where PyTorch's gradient is not a number
    mask = np.ones((2, 5), bool)
    seen = torch.ones(2, 5 + 6, dtype=torch.bool)
    (call(theirs, x, attention_mask=seen) * nchw(weights)).sum().backward()
    compare_gradients(slopes(ours, weights, x, context_mask=mask), theirs)
