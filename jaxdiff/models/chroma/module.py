"""ChromaTransformer2DModel: FLUX.1 with one small network in place of all modulation layers.

The approximator gives every vector that modulates a block, from the time and the number of the
vector. There is no pooled text and no guidance embedding; padding of the text is masked.
"""

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Bool, Dtype, Float
from jaxdiff.core.validate import check_shape
from jaxdiff.models.chroma.config import ChromaTransformer2DConfig
from jaxdiff.models.flux.blocks import (
    DoubleBlock,
    SingleBlock,
    pack,
    position_ids,
    unpack,
)
from jaxdiff.models.flux.config import PATCH
from jaxdiff.models.flux.module import check_tokens
from jaxdiff.nn.embeddings import TimestepEmbedding, sinusoidal
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.modulation import modulated_norm
from jaxdiff.nn.remat import remat
from jaxdiff.nn.rotary import Rotation, rotation

# The eps of torch's RMSNorm where none is given, that of float32.
APPROXIMATOR_EPS = float(jnp.finfo(jnp.float32).eps)
INDEX_FACTOR = 1000.0  # numbers of vectors are embedded on the scale of times


class ChromaTransformerBlock(DoubleBlock):
    """A double block whose modulation comes with the call."""

    @remat
    def __call__(
        self,
        image: Float[Array, "b n d"],
        text: Float[Array, "b m d"],
        image_modulation: Float[Array, "b 6 d"],
        text_modulation: Float[Array, "b 6 d"],
        by: Rotation,
        mask: Bool[Array, "b l"],
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b m d"]]:
        """Image and text after the block."""
        return self.modulated(image, text, image_modulation, text_modulation, by, mask)


class ChromaSingleTransformerBlock(SingleBlock):
    """A single block whose modulation comes with the call."""

    @remat
    def __call__(
        self,
        x: Float[Array, "b n d"],
        modulation: Float[Array, "b 3 d"],
        by: Rotation,
        mask: Bool[Array, "b n"],
    ) -> Float[Array, "b n d"]:
        """Tokens after the block."""
        return self.modulated(x, modulation, by, mask)


class Approximator(nnx.Module):
    """A residual perceptron from the embedding of time and number to a modulation vector."""

    def __init__(self, config: ChromaTransformer2DConfig, *, layers: LayerFactory):
        inner, depth = config.approximator_hidden_dim, range(config.approximator_layers)
        self.in_proj = layers.linear(config.approximator_num_channels, inner)
        self.layers = nnx.List(TimestepEmbedding(inner, inner, layers=layers) for _ in depth)
        self.norms = nnx.List(layers.rms_norm(inner, eps=APPROXIMATOR_EPS) for _ in depth)
        self.out_proj = layers.linear(inner, config.width, init=ZEROS)

    def __call__(self, x: Float[Array, "n c"]) -> Float[Array, "n d"]:
        """One vector for each row."""
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x)


class ChromaTransformer2DModel(nnx.Module):
    """Chroma: a transformer over tokens of text and of 2 x 2 latents, with rotary positions."""

    def __init__(
        self,
        config: ChromaTransformer2DConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        remat: str = "none",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(
            rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention, remat=remat
        )
        self.config = config
        self.dtype = dtype
        self.distilled_guidance_layer = Approximator(config, layers=layers)
        self.context_embedder = layers.linear(config.joint_attention_dim, config.width)
        self.x_embedder = layers.linear(config.in_channels, config.width)
        self.transformer_blocks = nnx.List(
            ChromaTransformerBlock(config, layers=layers) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nnx.List(
            ChromaSingleTransformerBlock(config, layers=layers)
            for _ in range(config.num_single_layers)
        )
        self.proj_out = layers.linear(config.width, config.token_channels, init=ZEROS)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Float[Array, "b"],
        context: Float[Array, "b m e"],
        *,
        context_mask: Bool[Array, "b m"],
    ) -> Float[Array, "b h w o"]:
        """The velocity, noise minus image, of noisy latents, in the dtype of `sample`.

        Sides are even; the channels of `sample` are a quarter of in_channels. `timesteps` go from
        0 (image) to 1000 (noise). `context` are text states and `context_mask` says which are of
        text; one token of padding behind it is seen too, all others by none. InputError otherwise.
        """
        check_tokens(self.config, sample, context)
        check_shape("context_mask", context_mask, context.shape[:2])
        h, w = sample.shape[1:3]
        tokens = pack(sample)
        b, n = tokens.shape[:2]
        x, text = self.x_embedder(tokens), self.context_embedder(context)
        m = text.shape[1]
        grid = (h // PATCH, w // PATCH)
        by = rotation(position_ids(m, (grid,)), self.config.axes_dims_rope)
        mask = jnp.concatenate([with_one_more(context_mask), jnp.ones((b, n), bool)], axis=1)
        modulation = self._modulation(timesteps)
        single, double = self.config.num_single_layers, self.config.num_layers
        # of single blocks, images in double blocks, texts in double blocks, the end
        of_image = 3 * single
        of_text = of_image + 6 * double
        for i, block in enumerate(self.transformer_blocks):
            image_vectors = modulation[:, of_image + 6 * i :][:, :6]
            text_vectors = modulation[:, of_text + 6 * i :][:, :6]
            x, text = block(x, text, image_vectors, text_vectors, by, mask)
        x = jnp.concatenate([text, x], axis=1)
        for i, block in enumerate(self.single_transformer_blocks):
            x = block(x, modulation[:, 3 * i :][:, :3], by, mask)
        x = modulated_norm(x[:, m:], shift=modulation[:, -2], scale=modulation[:, -1])
        return unpack(self.proj_out(x), (h, w)).astype(sample.dtype)

    def _modulation(self, timesteps: Float[Array, "b"]) -> Float[Array, "b k d"]:
        """The vectors that modulate, of each image, by their number."""
        quarter, count = self.config.approximator_num_channels // 4, self.config.num_modulations
        time = sinusoidal(timesteps, quarter)
        # the guidance scale that the network was distilled without
        guidance = sinusoidal(jnp.zeros_like(timesteps), quarter)
        number = sinusoidal(INDEX_FACTOR * jnp.arange(count, dtype=jnp.float32), 2 * quarter)
        of_image = jnp.concatenate([time, guidance], axis=-1)
        b = len(timesteps)
        rows = jnp.concatenate(
            [
                jnp.broadcast_to(of_image[:, None], (b, count, 2 * quarter)),
                jnp.broadcast_to(number[None], (b, count, 2 * quarter)),
            ],
            axis=-1,
        )
        vectors = self.distilled_guidance_layer(rows.reshape(b * count, -1))
        return vectors.reshape(b, count, -1)


def with_one_more(mask: Bool[Array, "b m"]) -> Bool[Array, "b m"]:
    """`mask` of a text that begins at the first token, with the token behind its end."""
    return jnp.arange(mask.shape[1])[None] <= mask.sum(axis=1, keepdims=True)
