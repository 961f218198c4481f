"""PriorTransformer: the network that denoises CLIP's image embeddings (unCLIP, 2204.06125)."""

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Bool, Dtype, Float, Int
from jaxdiff.core.validate import check_shape
from jaxdiff.models.prior.config import PriorTransformerConfig
from jaxdiff.nn.attention import reference_attention
from jaxdiff.nn.embeddings import TimestepEmbedding, sinusoidal
from jaxdiff.nn.initializers import ONES, ZEROS, Normal
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.remat import remat
from jaxdiff.nn.transformer import Attention, FeedForward, split_heads

HIDDEN = -1e9  # what is added to the scores of a hidden token, which its exponential rounds to 0


class CausalAttention(Attention):
    """Self-attention in which a token sees those before it and itself, unless they are hidden."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "b n c"], mask: Bool[Array, "b n"]
    ) -> Float[Array, "b n c"]:
        """Mix tokens, of which those without `mask` are not seen; no residual is added."""
        q, k, v = (split_heads(f(x), self.heads) for f in (self.to_q, self.to_k, self.to_v))
        b, n, _ = x.shape
        bias = jnp.where(mask, 0.0, HIDDEN)[:, None, None]
        bias = jnp.broadcast_to(bias, (b, self.heads, n, n))
        out = reference_attention(q, k, v, causal=True, bias=bias)
        return self.to_out[0](out.reshape(x.shape))


class PriorBlock(nnx.Module):
    """Causal self-attention and feed-forward, each a residual after a layer norm."""

    def __init__(self, config: PriorTransformerConfig, *, layers: LayerFactory):
        width = config.width
        self.norm1 = layers.layer_norm(width)
        self.attn1 = CausalAttention(
            width, layers=layers, heads=config.num_attention_heads, qkv_bias=True
        )
        self.norm3 = layers.layer_norm(width)
        self.ff = FeedForward(width, layers=layers, act="gelu")
        self.remat = layers.remat

    @remat
    def __call__(self, x: Float[Array, "b n c"], mask: Bool[Array, "b n"]) -> Float[Array, "b n c"]:
        """Apply the block."""
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))


class PriorTransformer(nnx.Module):
    """A causal transformer over text states, pooled text, time, noisy embedding and one more token.

    The output of the last token, `prd_embedding`, is the prediction (2204.06125, section 2.2).
    `clip_mean` and `clip_std`, which are not trained, are of the embeddings that it works on:
    normalised ones.
    """

    def __init__(
        self,
        config: PriorTransformerConfig,
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
        width, tokens = config.width, config.num_embeddings + config.additional_embeddings
        self.config = config
        self.dtype = dtype
        self.time_embedding = TimestepEmbedding(
            width, width, layers=layers, act=config.time_embed_act_fn
        )
        self.proj_in = layers.linear(config.embedding_dim, width)
        self.embedding_proj = layers.linear(config.pooled_width, width)
        self.encoder_hidden_states_proj = layers.linear(config.embedding_dim, width)
        self.positional_embedding = layers.param(Normal(0.01), (1, tokens, width))
        self.prd_embedding = layers.param(Normal(0.01), (1, 1, width))
        self.transformer_blocks = nnx.List(
            PriorBlock(config, layers=layers) for _ in range(config.num_layers)
        )
        self.norm_out = layers.layer_norm(width)
        self.proj_to_clip_embeddings = layers.linear(width, config.embedding_dim, init=ZEROS)
        self.clip_mean = layers.param(ZEROS, (1, config.embedding_dim))
        self.clip_std = layers.param(ONES, (1, config.embedding_dim))

    def __call__(
        self,
        sample: Float[Array, "b d"],
        timesteps: Float[Array, "b"] | Int[Array, "b"],
        context: Float[Array, "b n e"],
        *,
        text_embeds: Float[Array, "b p"],
        context_mask: Bool[Array, "b n"],
    ) -> Float[Array, "b d"]:
        """The network's output for noisy normalised image embeddings, in the dtype of `sample`.

        `timesteps` count the steps of the training schedule. `context` are text states, of which
        those without `context_mask` are padding, and `text_embeds` the pooled text embeddings.
        InputError for shapes that the config does not say.
        """
        config, b = self.config, len(sample)
        check_shape("sample", sample, (None, config.embedding_dim))
        check_shape("context", context, (b, config.num_embeddings, config.embedding_dim))
        check_shape("text_embeds", text_embeds, (b, config.pooled_width))
        check_shape("context_mask", context_mask, (b, config.num_embeddings))
        time = self.time_embedding(sinusoidal(timesteps, config.width))
        last = self.prd_embedding[...].astype(self.dtype)
        tokens = [
            self.encoder_hidden_states_proj(context),
            self.embedding_proj(text_embeds)[:, None],
            time[:, None],
            self.proj_in(sample)[:, None],
            jnp.broadcast_to(last, (b, 1, config.width)),
        ]
        x = jnp.concatenate(tokens, axis=1) + self.positional_embedding[...].astype(self.dtype)
        added = ((0, 0), (0, config.additional_embeddings))
        mask = jnp.pad(context_mask, added, constant_values=True)
        for block in self.transformer_blocks:
            x = block(x, mask)
        return self.proj_to_clip_embeddings(self.norm_out(x)[:, -1]).astype(sample.dtype)
