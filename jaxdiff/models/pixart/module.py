"""PixArtTransformer2DModel: a transformer on patches of latents that attends to a text.

DiT with cross-attention in each block and one modulation for all of them, to which each block adds
a table of its own (adaLN-single, PixArt-alpha, 2310.00426, section 2.3).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Dtype, Float, Int
from jaxdiff.core.validate import check_shape
from jaxdiff.models.pixart.config import PixArtTransformer2DConfig
from jaxdiff.nn.activations import activation
from jaxdiff.nn.embeddings import TimestepEmbedding, sinusoidal
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.modulation import gated, modulated_norm
from jaxdiff.nn.patches import PatchEmbed, unpatchify
from jaxdiff.nn.remat import remat
from jaxdiff.nn.transformer import Attention, FeedForward

TIME_WIDTH = 256  # of the sines and cosines of the timestep
CHUNKS = 6  # shift, scale and gate of self-attention, and of the feed-forward layers
Times = Float[Array, "b"] | Int[Array, "b"]


class TimestepEmbedder(nnx.Module):
    """Two linear layers on the sines and cosines of the timestep."""

    def __init__(self, width: int, *, layers: LayerFactory):
        self.timestep_embedder = TimestepEmbedding(TIME_WIDTH, width, layers=layers)

    def __call__(self, timesteps: Times) -> Float[Array, "b d"]:
        """The vector of the timestep."""
        return self.timestep_embedder(sinusoidal(timesteps, TIME_WIDTH))


class AdaLayerNormSingle(nnx.Module):
    """The modulation that all blocks share: `CHUNKS` vectors of the timestep. It starts at zero."""

    def __init__(self, width: int, *, layers: LayerFactory):
        self.emb = TimestepEmbedder(width, layers=layers)
        self.linear = layers.linear(width, CHUNKS * width, init=ZEROS)

    def __call__(self, timesteps: Times) -> tuple[Float[Array, "b k d"], Float[Array, "b d"]]:
        """The vectors of the blocks, and that of the timestep which they are made of."""
        vector = self.emb(timesteps)
        chunks = self.linear(jax.nn.silu(vector))
        return chunks.reshape(len(vector), CHUNKS, vector.shape[-1]), vector


class CaptionProjection(nnx.Module):
    """Two linear layers from the text's states to the width of the image's tokens."""

    def __init__(self, n_in: int, n_out: int, *, layers: LayerFactory):
        self.linear_1 = layers.linear(n_in, n_out)
        self.linear_2 = layers.linear(n_out, n_out)

    def __call__(self, states: Float[Array, "b m e"]) -> Float[Array, "b m d"]:
        """The projected states."""
        return self.linear_2(activation("gelu-approximate")(self.linear_1(states)))


class PixArtBlock(nnx.Module):
    """Self-attention, cross-attention to the text and feed-forward (2310.00426, figure 4).

    Cross-attention reads the tokens as they are, without a norm, and its output starts at zero.
    """

    def __init__(self, config: PixArtTransformer2DConfig, *, layers: LayerFactory):
        width = config.width
        attention = {"heads": config.num_attention_heads, "qkv_bias": config.attention_bias}
        self.attn1 = Attention(width, layers=layers, **attention)
        self.attn2 = Attention(
            width,
            layers=layers,
            context_width=config.cross_attention_dim,
            out_init=ZEROS,
            **attention,
        )
        self.ff = FeedForward(width, layers=layers, act=config.activation_fn)
        self.scale_shift_table = layers.param(ZEROS, (CHUNKS, width))
        self.norm_eps = config.norm_eps
        self.remat = layers.remat

    @remat
    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m e"],
        modulation: Float[Array, "b k d"],
    ) -> Float[Array, "b n d"]:
        """Apply the block."""
        table = self.scale_shift_table[...].astype(modulation.dtype)
        chunks = modulation + table[None]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (chunks[:, i] for i in range(CHUNKS))
        x = x + gated(self.attn1(modulated_norm(x, shift, scale, eps=self.norm_eps)), gate)
        x = x + self.attn2(x, context)
        normed = modulated_norm(x, ff_shift, ff_scale, eps=self.norm_eps)
        return x + gated(self.ff(normed), ff_gate)


class PixArtTransformer2DModel(nnx.Module):
    """A transformer on patches of latents, conditioned on timestep and text."""

    def __init__(
        self,
        config: PixArtTransformer2DConfig,
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
        config.check_additional_conditions()
        width, patch = config.width, config.patch_size
        self.config = config
        self.dtype = dtype
        self.pos_embed = PatchEmbed(
            config.in_channels,
            width,
            patch,
            layers=layers,
            base=config.sample_size // patch,
            scale=config.position_scale,
        )
        self.adaln_single = AdaLayerNormSingle(width, layers=layers)
        self.caption_projection = (
            None
            if config.caption_channels is None
            else CaptionProjection(config.caption_channels, width, layers=layers)
        )
        self.transformer_blocks = nnx.List(
            PixArtBlock(config, layers=layers) for _ in range(config.num_layers)
        )
        self.scale_shift_table = layers.param(ZEROS, (2, width))
        self.proj_out = layers.linear(width, patch * patch * config.output_channels, init=ZEROS)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Times,
        context: Float[Array, "b m e"],
    ) -> Float[Array, "b h w o"]:
        """The network's output for noisy latents, in the dtype of `sample`.

        `timesteps` count the steps of the training schedule, `context` are hidden states of a text.
        InputError for inputs of other widths, or latents whose sides are no whole patches. At sizes
        that were not trained on, positions are interpolated.
        """
        config = self.config
        check_shape("sample", sample, (None, None, None, config.in_channels))
        check_shape("context", context, (len(sample), None, config.context_width))
        grid = self.pos_embed.grid((sample.shape[1], sample.shape[2]))
        x = self.pos_embed(sample.astype(self.dtype))
        context = context.astype(self.dtype)
        if self.caption_projection is not None:
            context = self.caption_projection(context)
        modulation, vector = self.adaln_single(timesteps)
        for block in self.transformer_blocks:
            x = block(x, context, modulation)
        table = self.scale_shift_table[...].astype(self.dtype)
        shift, scale = (vector + table[i][None] for i in range(2))
        x = self.proj_out(modulated_norm(x, shift, scale))
        return unpatchify(x, grid, config.patch_size).astype(sample.dtype)
