"""LDMBertModel, the text encoder of latent diffusion's text-to-image model (2112.10752, 4.3.1).

A transformer without a causal mask, trained with the network that denoises: padding takes part. The
attention is narrower than the states.
"""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Dtype, Float, Int
from jaxdiff.core.validate import in_range
from jaxdiff.models.ldm_bert.config import LDMBertConfig
from jaxdiff.models.text_encoder import TextFeatures, check_tokens
from jaxdiff.nn.activations import activation
from jaxdiff.nn.attention import attention
from jaxdiff.nn.initializers import Normal
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.transformer import split_heads

INIT = Normal(0.02)


class _Attention(nnx.Module):
    def __init__(self, config: LDMBertConfig, *, layers: LayerFactory):
        width, inner = config.d_model, config.encoder_attention_heads * config.head_dim
        self.q_proj = layers.linear(width, inner, bias=False, init=INIT)
        self.k_proj = layers.linear(width, inner, bias=False, init=INIT)
        self.v_proj = layers.linear(width, inner, bias=False, init=INIT)
        self.out_proj = layers.linear(inner, width, init=INIT)
        self.heads = config.encoder_attention_heads
        self.backend = layers.attention

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        q, k, v = (split_heads(f(x), self.heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        out = attention(q, k, v, backend=self.backend)
        return self.out_proj(out.reshape(*x.shape[:2], -1))


class _Layer(nnx.Module):
    def __init__(self, config: LDMBertConfig, *, layers: LayerFactory):
        width, inner = config.d_model, config.encoder_ffn_dim
        self.self_attn_layer_norm = layers.layer_norm(width)
        self.self_attn = _Attention(config, layers=layers)
        self.final_layer_norm = layers.layer_norm(width)
        self.fc1 = layers.linear(width, inner, init=INIT)
        self.fc2 = layers.linear(inner, width, init=INIT)
        self.act = config.activation_function

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(activation(self.act)(self.fc1(self.final_layer_norm(x))))


class _Encoder(nnx.Module):
    def __init__(self, config: LDMBertConfig, *, layers: LayerFactory):
        self.embed_tokens = layers.embed(config.vocab_size, config.d_model)
        self.embed_positions = layers.embed(config.max_position_embeddings, config.d_model)
        self.layers = nnx.List(_Layer(config, layers=layers) for _ in range(config.encoder_layers))
        self.layer_norm = layers.layer_norm(config.d_model)

    def __call__(self, ids: Int[Array, "b n"], skip: int) -> Float[Array, "b n d"]:
        x = self.embed_tokens(ids) + self.embed_positions(jnp.arange(ids.shape[1]))[None]
        for layer in self.layers[: len(self.layers) - skip]:
            x = layer(x)
        return self.layer_norm(x)


class LDMBertModel(nnx.Module):
    """The text encoder; `to_logits`, with which it was to predict words, has no use here."""

    token_embedding: ClassVar[str] = "model.embed_tokens.embedding"

    def __init__(
        self,
        config: LDMBertConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        self.config = config
        self.model = _Encoder(config, layers=layers)
        self.to_logits = layers.linear(config.d_model, config.vocab_size, init=INIT)

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Last hidden state after the final norm, in the compute dtype."""
        return self.features(ids).last

    def features(self, ids: Int[Array, "b n"], skip: int = 0) -> TextFeatures:
        """Last hidden state, in the compute dtype; InputError if there are too many tokens.

        `skip` leaves out layers at the end, 0 to depth - 1.
        """
        in_range("clip_skip", skip, 0, self.config.encoder_layers - 1)
        check_tokens(ids, self.config.max_position_embeddings)
        return TextFeatures(self.model(ids, skip))

    def unused_parameters(self, layer: str, pooled: bool) -> tuple[str, ...]:
        """Path prefixes of weights that the last hidden states do not depend on."""
        del layer, pooled
        return ("to_logits.",)
