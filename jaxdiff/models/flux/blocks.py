"""Blocks of the FLUX.1 transformers: joint attention of text and image, with diffusers' names.

A double block has weights of its own for text and image, and one attention over both (SD3,
2403.03206, figure 2b). In a single block both share the weights, and attention and perceptron run
side by side (2302.05442, section 2). The norms have no weights: each block is modulated by
vectors, which come with the call.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.types import Array, Bool, Float, Int
from jaxdiff.models.flux.config import MLP_RATIO, PATCH, FluxTokensConfig
from jaxdiff.nn.activations import activation
from jaxdiff.nn.attention import attention
from jaxdiff.nn.attention_masked import masked_attention
from jaxdiff.nn.head_norm import HeadNorm
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.modulation import gated, modulated_norm
from jaxdiff.nn.rotary import Rotation
from jaxdiff.nn.transformer import FeedForward, split_heads

EPS = 1e-6  # of all norms
MLP_ACT = "gelu-approximate"


def position_ids(tokens: int, images: tuple[tuple[int, int], ...]) -> Int[Array, "n 3"]:
    """Image number, row and column of each token: zeros for text, then images row by row.

    `images` are heights and widths in tokens, first that of the image that is denoised.
    """
    ids = [np.zeros((tokens, 3), np.int32)]
    for number, (height, width) in enumerate(images):
        grid = np.indices((1, height, width), np.int32).reshape(3, -1).T
        ids.append(grid + np.array([number, 0, 0], np.int32))
    return jnp.asarray(np.concatenate(ids))


def pack(latents: Float[Array, "b h w c"]) -> Float[Array, "b n p"]:
    """Latents as tokens of 2 x 2, whose channels are ordered by channel, row and column."""
    b, h, w, c = latents.shape
    cells = latents.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c)
    return cells.transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, c * PATCH**2)


def unpack(tokens: Float[Array, "b n p"], size: tuple[int, int]) -> Float[Array, "b h w c"]:
    """Tokens as latents of `size`: the inverse of `pack`."""
    h, w = size
    cells = tokens.reshape(len(tokens), h // PATCH, w // PATCH, -1, PATCH, PATCH)
    return cells.transpose(0, 1, 4, 2, 5, 3).reshape(len(tokens), h, w, -1)


class Modulation(nnx.Module):
    """Vectors of a block from the embedding of time, guidance and text; zero at the start."""

    def __init__(self, width: int, count: int, *, layers: LayerFactory):
        self.linear = layers.linear(width, count * width, init=ZEROS)
        self.count = count

    def __call__(self, embedding: Float[Array, "b d"]) -> Float[Array, "b {self.count} d"]:
        """The vectors of each image."""
        out = self.linear(jax.nn.silu(embedding))
        return out.reshape(len(embedding), self.count, -1)


class SelfAttention(nnx.Module):
    """Multi-head attention with normed and rotated queries and keys, without a last projection."""

    def __init__(self, config: FluxTokensConfig, *, layers: LayerFactory):
        width = config.width
        self.norm_q = HeadNorm(config.attention_head_dim, layers=layers, eps=EPS)
        self.norm_k = HeadNorm(config.attention_head_dim, layers=layers, eps=EPS)
        self.to_q = layers.linear(width, width)
        self.to_k = layers.linear(width, width)
        self.to_v = layers.linear(width, width)
        self.heads = config.num_attention_heads
        self.backend = layers.attention

    def __call__(
        self, x: Float[Array, "b n d"], by: Rotation, mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        """Mix tokens, of which those without `mask` are seen by none."""
        q, k, v = (split_heads(f(x), self.heads) for f in (self.to_q, self.to_k, self.to_v))
        return self._attend(self.norm_q(q, by), self.norm_k(k, by), v, mask)

    def _attend(
        self, q: Array, k: Array, v: Array, mask: Bool[Array, "b n"] | None
    ) -> Float[Array, "b n d"]:
        if mask is None:
            out = attention(q, k, v, backend=self.backend)
        else:
            out = masked_attention(q, k, v, mask)
        return out.reshape(*out.shape[:2], -1)


class JointAttention(SelfAttention):
    """One attention over the tokens of text and image, each with projections of their own."""

    def __init__(self, config: FluxTokensConfig, *, layers: LayerFactory):
        super().__init__(config, layers=layers)
        width = config.width
        self.norm_added_q = HeadNorm(config.attention_head_dim, layers=layers, eps=EPS)
        self.norm_added_k = HeadNorm(config.attention_head_dim, layers=layers, eps=EPS)
        self.add_q_proj = layers.linear(width, width)
        self.add_k_proj = layers.linear(width, width)
        self.add_v_proj = layers.linear(width, width)
        self.to_out = nnx.List([layers.linear(width, width)])
        self.to_add_out = layers.linear(width, width)

    def __call__(
        self,
        image: Float[Array, "b n d"],
        text: Float[Array, "b m d"],
        by: Rotation,
        mask: Bool[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b m d"]]:
        """What is added to image and text; `by` and `mask` are of text, then image."""
        heads = self.heads
        q, k, v = (split_heads(f(image), heads) for f in (self.to_q, self.to_k, self.to_v))
        added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        text_q, text_k, text_v = (split_heads(f(text), heads) for f in added)
        m = text.shape[1]
        of_text, of_image = by.part(slice(m)), by.part(slice(m, None))
        q = jnp.concatenate([self.norm_added_q(text_q, of_text), self.norm_q(q, of_image)], axis=1)
        k = jnp.concatenate([self.norm_added_k(text_k, of_text), self.norm_k(k, of_image)], axis=1)
        out = self._attend(q, k, jnp.concatenate([text_v, v], axis=1), mask)
        return self.to_out[0](out[:, m:]), self.to_add_out(out[:, :m])


class DoubleBlock(nnx.Module):
    """Attention over text and image, then a perceptron for each: residuals after modulated norms.

    The six vectors of a modulation are shift, scale and gate of the attention, then of the
    perceptron.
    """

    def __init__(self, config: FluxTokensConfig, *, layers: LayerFactory):
        self.attn = JointAttention(config, layers=layers)
        self.ff = FeedForward(config.width, layers=layers, act=MLP_ACT)
        self.ff_context = FeedForward(config.width, layers=layers, act=MLP_ACT)
        self.remat = layers.remat

    def modulated(
        self,
        image: Float[Array, "b n d"],
        text: Float[Array, "b m d"],
        image_modulation: Float[Array, "b 6 d"],
        text_modulation: Float[Array, "b 6 d"],
        by: Rotation,
        mask: Bool[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b m d"]]:
        """Image and text after the block."""
        of_image, of_text = (_vectors(each) for each in (image_modulation, text_modulation))
        image_out, text_out = self.attn(
            modulated_norm(image, *of_image[:2]), modulated_norm(text, *of_text[:2]), by, mask
        )
        image = image + gated(image_out, of_image[2])
        text = text + gated(text_out, of_text[2])
        image_out = self.ff(modulated_norm(image, *of_image[3:5]))
        text_out = self.ff_context(modulated_norm(text, *of_text[3:5]))
        return image + gated(image_out, of_image[5]), text + gated(text_out, of_text[5])


class SingleBlock(nnx.Module):
    """Attention and perceptron side by side over the tokens of text and image.

    The three vectors of a modulation are shift, scale and gate.
    """

    def __init__(self, config: FluxTokensConfig, *, layers: LayerFactory):
        width = config.width
        self.attn = SelfAttention(config, layers=layers)
        self.proj_mlp = layers.linear(width, MLP_RATIO * width)
        self.proj_out = layers.linear((1 + MLP_RATIO) * width, width)
        self.remat = layers.remat

    def modulated(
        self,
        x: Float[Array, "b n d"],
        modulation: Float[Array, "b 3 d"],
        by: Rotation,
        mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Tokens after the block."""
        shift, scale, gate = _vectors(modulation)
        normed = modulated_norm(x, shift, scale)
        inner = activation(MLP_ACT)(self.proj_mlp(normed))
        out = self.proj_out.of_parts(self.attn(normed, by, mask), inner)
        return x + gated(out, gate)


def _vectors(modulation: Float[Array, "b k d"]) -> list[Float[Array, "b d"]]:
    return [modulation[:, i] for i in range(modulation.shape[1])]
