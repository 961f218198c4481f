"""T5's encoder (Raffel et al. 2020; version 1.1), with transformers' parameter names.

Two things differ from other transformers: scores are not divided by sqrt(d), and positions count
only by a learned bias for each head and distance, which all layers share. The sums between the
layers are float32 in every compute dtype, because those of the XXL model leave float16's range.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.types import Array, Bool, Dtype, Float, Int, NDArray
from jaxdiff.core.validate import in_range
from jaxdiff.models.t5.config import T5Config
from jaxdiff.models.text_encoder import TextFeatures
from jaxdiff.nn.attention import reference_attention
from jaxdiff.nn.initializers import Normal
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.transformer import split_heads

MASKED = float(np.finfo(np.float32).min)  # finite: a text of padding alone is no NaN


class _SelfAttention(nnx.Module):
    def __init__(self, config: T5Config, *, layers: LayerFactory, has_bias: bool):
        width, inner = config.d_model, config.num_heads * config.d_kv
        into = Normal(width**-0.5)
        self.q = layers.linear(width, inner, bias=False, init=Normal((width * config.d_kv) ** -0.5))
        self.k = layers.linear(width, inner, bias=False, init=into)
        self.v = layers.linear(width, inner, bias=False, init=into)
        self.o = layers.linear(inner, width, bias=False, init=Normal(inner**-0.5))
        if has_bias:
            self.relative_attention_bias = layers.embed(
                config.relative_attention_num_buckets, config.num_heads, std=width**-0.5
            )
        self.heads = config.num_heads

    def __call__(
        self, x: Float[Array, "b n d"], bias: Float[Array, "_ h n n"]
    ) -> Float[Array, "b n d"]:
        q, k, v = (split_heads(f(x), self.heads) for f in (self.q, self.k, self.v))
        out = reference_attention(q, k, v, bias=bias, scale=1.0)
        return self.o(out.reshape(*x.shape[:2], -1))


class _LayerSelfAttention(nnx.Module):
    def __init__(self, config: T5Config, *, layers: LayerFactory, has_bias: bool):
        self.SelfAttention = _SelfAttention(config, layers=layers, has_bias=has_bias)
        self.layer_norm = layers.rms_norm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(
        self, x: Float[Array, "b n d"], bias: Float[Array, "_ h n n"]
    ) -> Float[Array, "b n d"]:
        return x + self.SelfAttention(self.layer_norm(x), bias).astype(x.dtype)


class _FeedForward(nnx.Module):
    def __init__(self, config: T5Config, *, layers: LayerFactory):
        width, inner = config.d_model, config.d_ff
        into = Normal(width**-0.5)
        if config.gated:
            self.wi_0 = layers.linear(width, inner, bias=False, init=into)
            self.wi_1 = layers.linear(width, inner, bias=False, init=into)
        else:
            self.wi = layers.linear(width, inner, bias=False, init=into)
        self.wo = layers.linear(inner, width, bias=False, init=Normal(inner**-0.5))
        if self.wo.dtype == jnp.float16:
            self.wo.dtype = jnp.float32
        self.gated = config.gated

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        if not self.gated:
            return self.wo(jax.nn.relu(self.wi(x)))
        gate = jax.nn.gelu(self.wi_0(x), approximate=True)
        return self.wo(gate.astype(self.wo.dtype) * self.wi_1(x).astype(self.wo.dtype))


class _LayerFF(nnx.Module):
    def __init__(self, config: T5Config, *, layers: LayerFactory):
        self.DenseReluDense = _FeedForward(config, layers=layers)
        self.layer_norm = layers.rms_norm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return x + self.DenseReluDense(self.layer_norm(x)).astype(x.dtype)


class _Block(nnx.Module):
    def __init__(self, config: T5Config, *, layers: LayerFactory, has_bias: bool):
        self.layer = nnx.List[Any](
            [
                _LayerSelfAttention(config, layers=layers, has_bias=has_bias),
                _LayerFF(config, layers=layers),
            ]
        )

    def __call__(
        self, x: Float[Array, "b n d"], bias: Float[Array, "_ h n n"]
    ) -> Float[Array, "b n d"]:
        return self.layer[1](self.layer[0](x, bias))


class _Stack(nnx.Module):
    def __init__(self, config: T5Config, *, layers: LayerFactory):
        self.config = config
        self.block = nnx.List(
            _Block(config, layers=layers, has_bias=i == 0) for i in range(config.num_layers)
        )
        self.final_layer_norm = layers.rms_norm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, skip: int
    ) -> Float[Array, "b n d"]:
        bias = self._position_bias(x.shape[1])
        if mask is not None:
            bias = jnp.where(mask[:, None, None, :], bias, MASKED)
        x = x.astype(jnp.float32)
        for block in self.block[: len(self.block) - skip]:
            x = block(x, bias)
        return self.final_layer_norm(x)

    def _position_bias(self, length: int) -> Float[Array, "1 h n n"]:
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        buckets = relative_position_buckets(
            length,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        return table(jnp.asarray(buckets)).astype(jnp.float32).transpose(2, 0, 1)[None]


class T5EncoderModel(nnx.Module):
    """T5's encoder."""

    token_embedding: ClassVar[str] = "shared.embedding"

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        self.config = config
        self.shared = layers.embed(config.vocab_size, config.d_model, std=1.0)
        self.encoder = _Stack(config, layers=layers)

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Last hidden state after the final norm, in the compute dtype; padding takes part."""
        return self.features(ids).last

    def features(
        self, ids: Int[Array, "b n"], skip: int = 0, *, masks_padding: bool = False
    ) -> TextFeatures:
        """Last hidden state, in the compute dtype, and the mask of tokens that are not padding.

        With `masks_padding` no token sees padding. `skip` leaves out layers at the end, 0 to
        depth - 1.
        """
        in_range("clip_skip", skip, 0, self.config.num_layers - 1)
        mask = ids != self.config.pad_token_id
        last = self.encoder(self.shared(ids), mask if masks_padding else None, skip)
        return TextFeatures(last, mask=mask)

    def unused_parameters(self, layer: str, pooled: bool) -> tuple[str, ...]:
        """Path prefixes of weights that the last hidden states do not depend on: none."""
        del layer, pooled
        return ()


def relative_position_buckets(
    length: int, *, num_buckets: int, max_distance: int
) -> Int[NDArray, "{length} {length}"]:
    """The bucket of each pair of a query and a key by their distance, from 0 to `num_buckets` - 1.

    Of the buckets of keys before and after the query, which are half each, the first half holds one
    distance each and the others grow like its logarithm up to `max_distance` (section 2.1).
    """
    half = num_buckets // 2
    exact = half // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # In float32, as in the original code, which decides at whole powers.
    ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    growth = np.log(ratio) / np.float32(math.log(max_distance / exact))
    far = exact + (growth * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return (bucket + half * (offset > 0)).astype(np.int32)
