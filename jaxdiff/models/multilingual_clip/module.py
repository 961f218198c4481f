"""MultilingualCLIP, the text encoder of Kandinsky 2.1, with diffusers' parameter names.

XLM-RoBERTa (1911.02116), a transformer with a norm after each residual sum, and a linear layer that
maps the mean of a text's states to CLIP's embeddings (Carlsson et al. 2022). No token sees padding.
"""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Bool, Dtype, Float, Int
from jaxdiff.core.validate import in_range
from jaxdiff.models.multilingual_clip.config import MultilingualCLIPConfig
from jaxdiff.models.text_encoder import TextFeatures, check_tokens
from jaxdiff.nn.activations import activation
from jaxdiff.nn.attention_masked import masked_attention
from jaxdiff.nn.initializers import Normal
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.transformer import split_heads

INIT = Normal(0.02)


class _Embeddings(nnx.Module):
    def __init__(self, config: MultilingualCLIPConfig, *, layers: LayerFactory):
        width = config.hidden_size
        self.word_embeddings = layers.embed(config.vocab_size, width)
        self.position_embeddings = layers.embed(config.max_position_embeddings, width)
        self.token_type_embeddings = layers.embed(config.type_vocab_size, width)
        self.LayerNorm = layers.layer_norm(width, eps=config.layer_norm_eps)
        self.padding = config.pad_token_id

    def __call__(self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        # Tokens of the text are counted from padding + 1; padding is at its own id.
        numbers = jnp.cumsum(mask, axis=1, dtype=ids.dtype)
        positions = self.padding + jnp.where(mask, numbers, 0)
        kind = self.token_type_embeddings(jnp.zeros_like(ids))
        return self.LayerNorm(
            self.word_embeddings(ids) + kind + self.position_embeddings(positions)
        )


class _QueryKeyValue(nnx.Module):
    def __init__(self, width: int, *, layers: LayerFactory):
        self.query = layers.linear(width, width, init=INIT)
        self.key = layers.linear(width, width, init=INIT)
        self.value = layers.linear(width, width, init=INIT)


class _ResidualOutput(nnx.Module):
    """The norm of a linear layer's output and the block's input."""

    def __init__(self, n_in: int, n_out: int, *, layers: LayerFactory, eps: float):
        self.dense = layers.linear(n_in, n_out, init=INIT)
        self.LayerNorm = layers.layer_norm(n_out, eps=eps)

    def __call__(self, h: Float[Array, "b n i"], x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.LayerNorm(self.dense(h) + x)


class _Attention(nnx.Module):
    def __init__(self, config: MultilingualCLIPConfig, *, layers: LayerFactory):
        width = config.hidden_size
        self.self = _QueryKeyValue(width, layers=layers)
        self.output = _ResidualOutput(width, width, layers=layers, eps=config.layer_norm_eps)
        self.heads = config.num_attention_heads

    def __call__(self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        maps = (self.self.query, self.self.key, self.self.value)
        q, k, v = (split_heads(f(x), self.heads) for f in maps)
        return self.output(masked_attention(q, k, v, mask).reshape(x.shape), x)


class _Dense(nnx.Module):
    def __init__(self, n_in: int, n_out: int, *, layers: LayerFactory):
        self.dense = layers.linear(n_in, n_out, init=INIT)


class _Layer(nnx.Module):
    def __init__(self, config: MultilingualCLIPConfig, *, layers: LayerFactory):
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = _Attention(config, layers=layers)
        self.intermediate = _Dense(width, inner, layers=layers)
        self.output = _ResidualOutput(inner, width, layers=layers, eps=config.layer_norm_eps)
        self.act = config.hidden_act

    def __call__(self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        x = self.attention(x, mask)
        return self.output(activation(self.act)(self.intermediate.dense(x)), x)


class _Encoder(nnx.Module):
    def __init__(self, config: MultilingualCLIPConfig, *, layers: LayerFactory):
        depth = range(config.num_hidden_layers)
        self.layer = nnx.List(_Layer(config, layers=layers) for _ in depth)


class _XLMRoberta(nnx.Module):
    """The transformer; `pooler`, a layer of the first token's state, has no use here."""

    def __init__(self, config: MultilingualCLIPConfig, *, layers: LayerFactory):
        self.embeddings = _Embeddings(config, layers=layers)
        self.encoder = _Encoder(config, layers=layers)
        self.pooler = _Dense(config.hidden_size, config.hidden_size, layers=layers)

    def __call__(
        self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]
    ) -> list[Float[Array, "b n d"]]:
        """The states before the first layer and after each."""
        states = [self.embeddings(ids, mask)]
        for layer in self.encoder.layer:
            states.append(layer(states[-1], mask))
        return states


class MultilingualCLIP(nnx.Module):
    """The text encoder."""

    token_embedding: ClassVar[str] = "transformer.embeddings.word_embeddings.embedding"

    def __init__(
        self,
        config: MultilingualCLIPConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        self.config = config
        self.transformer = _XLMRoberta(config, layers=layers)
        self.LinearTransformation = layers.linear(config.hidden_size, config.numDims, init=INIT)

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Last hidden state, in the compute dtype."""
        return self.features(ids).last

    def features(self, ids: Int[Array, "b n"], skip: int = 0) -> TextFeatures:
        """Last hidden state and pooled embedding, in the compute dtype, and the mask of the text.

        The pooled embedding is the projected mean of the text's states after all layers. `skip`
        leaves out layers at the end of the hidden state, 0 to depth - 1. InputError if there are
        too many tokens. A text of padding alone has no numbers.
        """
        in_range("clip_skip", skip, 0, self.config.num_hidden_layers - 1)
        check_tokens(ids, self.config.max_tokens)
        mask = ids != self.config.pad_token_id
        states = self.transformer(ids, mask)
        mean = states[-1].astype(jnp.float32).mean(1, where=mask[:, :, None])
        return TextFeatures(states[-1 - skip], pooled=self.LinearTransformation(mean), mask=mask)

    def unused_parameters(self, layer: str, pooled: bool) -> tuple[str, ...]:
        """Path prefixes of weights that neither the hidden states nor `pooled` depend on."""
        del layer
        return ("transformer.pooler.", *(() if pooled else ("LinearTransformation.",)))
