"""Self-attention between pixels with keys and values of a context beside their own.

As GLIDE has it (2112.10741, section 4), and after it Imagen's and DALL-E 2's successors. The names
are those of diffusers' blocks "SimpleCrossAttn".
"""

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float
from jaxdiff.nn.attention import attention
from jaxdiff.nn.attention_masked import masked_attention
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.remat import remat
from jaxdiff.nn.transformer import split_heads

CONTEXT_GROUPS = 32  # of the norm of the context, in every model


class AddedKVAttention(nnx.Module):
    """x + the attention of norm(x) over the context and itself; starts as the identity.

    Heads have the width `head_width`. `norms_context` normalises the context over its tokens and
    groups of channels; `only_cross_attention` leaves out the keys and values of the pixels.
    """

    def __init__(
        self,
        channels: int,
        *,
        layers: LayerFactory,
        head_width: int,
        context_width: int,
        groups: int,
        norms_context: bool = False,
        only_cross_attention: bool = False,
    ):
        if head_width < 1 or channels % head_width:
            raise InputError(
                f"width of an attention head: got {head_width}, expected a divisor of {channels}"
            )
        self.group_norm = layers.group_norm(channels, groups=groups, eps=1e-5)
        self.norm_cross = (
            layers.group_norm(context_width, groups=CONTEXT_GROUPS, eps=1e-5)
            if norms_context
            else None
        )
        self.to_q = layers.linear(channels, channels)
        self.to_k = None if only_cross_attention else layers.linear(channels, channels)
        self.to_v = None if only_cross_attention else layers.linear(channels, channels)
        self.add_k_proj = layers.linear(context_width, channels)
        self.add_v_proj = layers.linear(context_width, channels)
        self.to_out = nnx.List([layers.linear(channels, channels, init=ZEROS)])
        self.heads = channels // head_width
        self.backend = layers.attention
        self.remat = layers.remat

    @remat
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Float[Array, "b m e"],
        context_mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Mix pixels and context; tokens of the context without `context_mask` are not seen."""
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        context = context if self.norm_cross is None else self.norm_cross(context)
        q, k, v = self.to_q(tokens), self.add_k_proj(context), self.add_v_proj(context)
        if self.to_k is not None and self.to_v is not None:
            k = jnp.concatenate([k, self.to_k(tokens)], axis=1)
            v = jnp.concatenate([v, self.to_v(tokens)], axis=1)
        added = k.shape[1] - context.shape[1]
        q, k, v = (split_heads(each, self.heads) for each in (q, k, v))
        if context_mask is None:
            out = attention(q, k, v, backend=self.backend)
        else:
            mask = jnp.pad(context_mask, ((0, 0), (0, added)), constant_values=True)
            out = masked_attention(q, k, v, mask)
        return x + self.to_out[0](out.reshape(tokens.shape)).reshape(x.shape)
