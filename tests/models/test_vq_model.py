"""VQModel's codebook, and the spatial norms of MoVQ, by what they are defined to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import initialise, param_dict
from jaxdiff.models.presets import preset
from jaxdiff.models.vq_model import VQModel, VQModelConfig
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.spatial_norm import SpatialNorm
from jaxdiff.parallel.sharding import ANY, VAE, spec

MOVQ = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_type": "spatial",
    "num_vq_embeddings": 16,
}


def test_a_spatial_norm_scales_and_shifts_each_place():
    norm = SpatialNorm(32, 2, layers=LayerFactory(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    y, b = rng.normal(size=(2, 2, 32)).astype(np.float32)
    for conv, kernel in ((norm.conv_y, y), (norm.conv_b, b)):
        conv.kernel[...] = jnp.asarray(kernel)[None, None]
    x = rng.normal(size=(1, 4, 6, 32)).astype(np.float32)
    latents = rng.normal(size=(1, 2, 3, 2)).astype(np.float32)
    # Groups of one channel each, and each latent stands for two rows of two pixels.
    mean, deviation = x.mean((1, 2), keepdims=True), x.std((1, 2), keepdims=True)
    places = latents.repeat(2, axis=1).repeat(2, axis=2)
    expected = (x - mean) / deviation * (places @ y) + places @ b
    found = norm(jnp.asarray(x), jnp.asarray(latents))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near_float32():
    """Weights and activations have 8 bits; outputs are float32."""
    wide = initialise(VQModel, VQModelConfig(**MOVQ), seed=0)
    narrow = initialise(VQModel, VQModelConfig(**MOVQ), seed=0, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    z = jax.random.normal(jax.random.key(1), (1, 4, 4, 3))
    for got, expected in (
        (narrow.encode(x)[0], wide.encode(x)[0]),
        (narrow.decode(z), wide.decode(z)),
    ):
        assert got.dtype == jnp.float32
        scale = jnp.abs(expected).max()
        assert 0 < jnp.abs(got - expected).max() < 0.1 * scale


def test_matrices_are_sharded():
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    column, row = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
    for path, leaf in param_dict(preset("vae", "kandinsky-movq").abstract()).items():
        got = spec(path, leaf.shape, VAE, sizes)
        # A table of 16384 vectors of width 4 is all that the rules of several models split more.
        assert got == spec(path, leaf.shape, ANY, sizes) or path == "quantize.embedding.embedding"
        *_, name, leaf_name = path.split(".")
        if leaf_name != "kernel":
            continue
        if name in ("to_q", "to_k", "to_v"):
            assert got == column, path
        elif path.endswith("to_out.0.kernel"):
            assert got == row, path
        elif name in ("conv_y", "conv_b"):
            assert got == PartitionSpec(None, None, None, "fsdp")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_type": "layer"}, "norm_type: got 'layer', expected one of group, spatial"),
        ({"block_out_channels": (32, 48)}, "block_out_channels: got 48 with spatial norms"),
        ({"up_block_types": ("AttnUpDecoderBlock2D", "UpBlock2D")}, "up_block_types: got 'UpBloc"),
        ({"vq_embed_dim": 5}, "vq_embed_dim: got 5, expected latent_channels, 3"),
        ({"lookup_from_codebook": True}, "lookup_from_codebook: got True"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(InputError, match=message):
        VQModelConfig(**MOVQ | fields)
