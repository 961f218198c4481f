"""DiTTransformer2DModel: a transformer on patches of latents, told a class (DiT, 2212.09748)."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Dtype, Float, Int
from jaxdiff.core.validate import check_shape
from jaxdiff.models.dit.config import DiTTransformer2DConfig
from jaxdiff.nn.embeddings import LabelEmbedding, TimestepEmbedding, sinusoidal
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.modulation import AdaLayerNormZero, gated, modulated_norm
from jaxdiff.nn.patches import PatchEmbed, unpatchify
from jaxdiff.nn.remat import remat
from jaxdiff.nn.transformer import Attention, FeedForward

TIME_WIDTH = 256  # of the sines and cosines of the timestep
Times = Float[Array, "b"] | Int[Array, "b"]


class TimestepLabelEmbeddings(nnx.Module):
    """The sum of the embeddings of timestep and class."""

    def __init__(self, config: DiTTransformer2DConfig, *, layers: LayerFactory):
        self.timestep_embedder = TimestepEmbedding(TIME_WIDTH, config.width, layers=layers)
        self.class_embedder = LabelEmbedding(
            config.num_embeds_ada_norm, config.width, layers=layers
        )
        self.freq_shift, self.reverses_time = config.freq_shift, config.reverses_time

    def __call__(self, timesteps: Times, labels: Int[Array, "b"]) -> Float[Array, "b d"]:
        """The vector that modulates a block."""
        if self.reverses_time:
            timesteps = 1 - timesteps.astype(jnp.float32) / 1000
        sines = sinusoidal(timesteps, TIME_WIDTH, freq_shift=self.freq_shift)
        return self.timestep_embedder(sines) + self.class_embedder(labels)


class DiTBlock(nnx.Module):
    """Self-attention and feed-forward, each between adaLN and a gate (2212.09748, figure 3)."""

    def __init__(self, config: DiTTransformer2DConfig, *, layers: LayerFactory):
        width = config.width
        # Every block stores the same embedding, trained as one in the authors' code.
        embedding = TimestepLabelEmbeddings(config, layers=layers)
        self.norm1 = AdaLayerNormZero(width, layers=layers, emb=embedding)
        self.attn1 = Attention(
            width, layers=layers, heads=config.num_attention_heads, qkv_bias=config.attention_bias
        )
        self.ff = FeedForward(width, layers=layers, act=config.activation_fn)
        self.norm_eps = config.norm_eps
        self.remat = layers.remat

    @remat
    def __call__(
        self, x: Float[Array, "b n d"], timesteps: Times, labels: Int[Array, "b"]
    ) -> Float[Array, "b n d"]:
        """Apply the block."""
        normed, (gate, ff_shift, ff_scale, ff_gate) = self.norm1(
            x, self.condition(timesteps, labels)
        )
        x = x + gated(self.attn1(normed), gate)
        normed = modulated_norm(x, ff_shift, ff_scale, eps=self.norm_eps)
        return x + gated(self.ff(normed), ff_gate)

    def condition(self, timesteps: Times, labels: Int[Array, "b"]) -> Float[Array, "b d"]:
        """The vector of timestep and class."""
        return self.norm1.emb(timesteps, labels)  # pyright: ignore[reportCallIssue, reportOptionalCall]


class DiTTransformer2DModel(nnx.Module):
    """A transformer on patches of latents, conditioned on timestep and class by adaLN-zero."""

    def __init__(
        self,
        config: DiTTransformer2DConfig,
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
        width, patch = config.width, config.patch_size
        self.config = config
        self.dtype = dtype
        self.pos_embed = PatchEmbed(
            config.in_channels, width, patch, layers=layers, base=config.sample_size // patch
        )
        self.transformer_blocks = nnx.List(
            DiTBlock(config, layers=layers) for _ in range(config.num_layers)
        )
        self.proj_out_1 = layers.linear(width, 2 * width, init=ZEROS)
        self.proj_out_2 = layers.linear(width, patch * patch * config.output_channels, init=ZEROS)

    def __call__(
        self, sample: Float[Array, "b h w c"], timesteps: Times, class_labels: Int[Array, "b"]
    ) -> Float[Array, "b h w o"]:
        """The network's output for noisy latents, in the dtype of `sample`.

        `timesteps` count the steps of the training schedule; the class label
        `config.num_embeds_ada_norm` is no class. InputError for latents of other channels, or
        whose sides are no whole patches. At sizes that were not trained on, positions are
        interpolated.
        """
        check_shape("sample", sample, (None, None, None, self.config.in_channels))
        grid = self.pos_embed.grid((sample.shape[1], sample.shape[2]))
        x = self.pos_embed(sample.astype(self.dtype))
        for block in self.transformer_blocks:
            x = block(x, timesteps, class_labels)
        vector = self.transformer_blocks[0].condition(timesteps, class_labels)
        shift, scale = jnp.split(self.proj_out_1(jax.nn.silu(vector)), 2, axis=-1)
        x = self.proj_out_2(modulated_norm(x, shift, scale))
        return unpatchify(x, grid, self.config.patch_size).astype(sample.dtype)
