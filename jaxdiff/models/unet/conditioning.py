"""What a UNet makes of its conditioning: embeddings that join the time's, and the context.

The kinds are the values of addition_embed_type, class_embed_type and encoder_hid_dim_type in
diffusers; parameter names are diffusers', too.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float
from jaxdiff.models.unet.config import HINT_CHANNELS, UNet2DConditionConfig
from jaxdiff.nn.attention import attention
from jaxdiff.nn.embeddings import TimestepEmbedding
from jaxdiff.nn.initializers import Normal
from jaxdiff.nn.layers import Embed, LayerFactory, Linear, Placeholder
from jaxdiff.nn.transformer import split_heads

TEXT_IMAGE_TOKENS = 10  # of an image beside those of a text
IMAGE_TOKENS = 32  # of an image alone
HINT_LAYERS = ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2), (HINT_CHANNELS, 1))
HINT_SCALE = 8  # rows of a hint for one of the latents


class AttentionPooling(nnx.Module):
    """Attention of the mean of the tokens over itself and them, as in Imagen (2205.11487)."""

    def __init__(self, width: int, *, layers: LayerFactory, heads: int):
        if heads < 1 or width % heads:
            raise InputError(
                f"addition_embed_type_num_heads: got {heads}, expected a divisor of {width}"
            )
        self.positional_embedding = layers.param(Normal(width**-0.5), (1, width))
        self.q_proj = layers.linear(width, width)
        self.k_proj = layers.linear(width, width)
        self.v_proj = layers.linear(width, width)
        self.heads = heads
        self.backend = layers.attention

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b c"]:
        """One vector for all tokens."""
        query = x.mean(axis=1, keepdims=True) + self.positional_embedding[...][None].astype(x.dtype)
        source = jnp.concatenate([query, x], axis=1)
        heads = [
            split_heads(each, self.heads)
            for each in (self.q_proj(query), self.k_proj(source), self.v_proj(source))
        ]
        return attention(*heads, backend=self.backend).reshape(x.shape[0], x.shape[2])


class TextTimeEmbedding(nnx.Module):
    """Of a text's states: pooled by attention, between two layer norms."""

    def __init__(self, n_in: int, n_out: int, *, layers: LayerFactory, heads: int):
        self.norm1 = layers.layer_norm(n_in)
        self.pool = AttentionPooling(n_in, layers=layers, heads=heads)
        self.proj = layers.linear(n_in, n_out)
        self.norm2 = layers.layer_norm(n_out)

    def __call__(self, states: Float[Array, "b n i"]) -> Float[Array, "b o"]:
        """The embedding, in the compute dtype."""
        return self.norm2(self.proj(self.pool(self.norm1(states))))


class TextImageTimeEmbedding(nnx.Module):
    """Of the pooled embeddings of a text and of an image: the sum of their projections."""

    def __init__(self, n_in: int, n_out: int, *, layers: LayerFactory):
        self.text_proj = layers.linear(n_in, n_out)
        self.text_norm = layers.layer_norm(n_out)
        self.image_proj = layers.linear(n_in, n_out)

    def __call__(
        self, text: Float[Array, "b i"], image: Float[Array, "b i"]
    ) -> Float[Array, "b o"]:
        """The embedding, in the compute dtype."""
        return self.image_proj(image) + self.text_norm(self.text_proj(text))


class ImageTimeEmbedding(nnx.Module):
    """Of an image's embedding: a projection and a layer norm.

    With a hint there are convolutions, too, from another image to features of the latents' size.
    """

    def __init__(self, n_in: int, n_out: int, *, layers: LayerFactory, has_hint: bool = False):
        self.image_proj = layers.linear(n_in, n_out)
        self.image_norm = layers.layer_norm(n_out)
        self.input_hint_block = nnx.List(_hint_layers(layers)) if has_hint else None

    def __call__(self, image: Float[Array, "b i"]) -> Float[Array, "b o"]:
        """The embedding, in the compute dtype."""
        return self.image_norm(self.image_proj(image))

    def encode_hint(self, hint: Float[Array, "b h8 w8 3"]) -> Float[Array, "b h w c"]:
        """The features of a hint: convolutions with SiLU between them."""
        x, convolutions = hint, list(self.input_hint_block or [])[::2]
        for convolution in convolutions[:-1]:
            x = jax.nn.silu(convolution(x))
        return convolutions[-1](x)


def _hint_layers(layers: LayerFactory) -> list[nnx.Module]:
    made: list[nnx.Module] = []
    channels, side = 3, (1, 1)
    for width, stride in HINT_LAYERS:
        made.append(layers.conv(channels, width, 3, stride=stride, padding=(side, side)))
        made.append(Placeholder())
        channels = width
    return made[:-1]


class ImageProjection(nnx.Module):
    """An image's embedding as tokens of the context, with a layer norm."""

    def __init__(self, n_in: int, width: int, *, layers: LayerFactory):
        self.image_embeds = layers.linear(n_in, IMAGE_TOKENS * width)
        self.norm = layers.layer_norm(width)

    def __call__(self, image: Float[Array, "b i"]) -> Float[Array, "b m d"]:
        """The tokens."""
        return self.norm(self.image_embeds(image).reshape(image.shape[0], IMAGE_TOKENS, -1))


class TextImageProjection(nnx.Module):
    """The tokens of an image's embedding, then the projected states of a text."""

    def __init__(self, text_width: int, width: int, *, layers: LayerFactory):
        self.image_embeds = layers.linear(width, TEXT_IMAGE_TOKENS * width)
        self.text_proj = layers.linear(text_width, width)

    def __call__(
        self, states: Float[Array, "b n e"], image: Float[Array, "b i"]
    ) -> Float[Array, "b m d"]:
        """The tokens of both."""
        tokens = self.image_embeds(image).reshape(image.shape[0], TEXT_IMAGE_TOKENS, -1)
        return jnp.concatenate([tokens, self.text_proj(states)], axis=1)


AddedEmbedding = TimestepEmbedding | TextTimeEmbedding | TextImageTimeEmbedding | ImageTimeEmbedding
ContextProjection = Linear | ImageProjection | TextImageProjection


def make_added_embedding(
    config: UNet2DConditionConfig, *, layers: LayerFactory
) -> AddedEmbedding | None:
    """The embedding of what addition_embed_type names, to add to that of the time."""
    kind, width = config.addition_embed_type, config.time_width
    if kind is None:
        return None
    if kind == "text_time":
        return TimestepEmbedding(
            config.projection_class_embeddings_input_dim or 0, width, layers=layers
        )
    context_width = config.per_block("cross_attention_dim")[0]
    if kind == "text":
        return TextTimeEmbedding(
            config.encoder_hid_dim or context_width,
            width,
            layers=layers,
            heads=config.addition_embed_type_num_heads,
        )
    if kind == "text_image":
        return TextImageTimeEmbedding(context_width, width, layers=layers)
    return ImageTimeEmbedding(
        config.encoder_hid_dim or 0, width, layers=layers, has_hint=kind == "image_hint"
    )


def make_class_embedding(
    config: UNet2DConditionConfig, *, layers: LayerFactory
) -> TimestepEmbedding | Embed | None:
    """The embedding of class labels; None if there are none, or if they are embedded already."""
    kind, width = config.class_embed_type, config.time_width
    if kind == "timestep":
        return TimestepEmbedding(
            config.block_out_channels[0], width, layers=layers, act=config.act_fn
        )
    if kind == "projection":
        return TimestepEmbedding(
            config.projection_class_embeddings_input_dim or 0, width, layers=layers
        )
    if config.num_class_embeds is not None:
        return layers.embed(config.num_class_embeds, width)
    return None


def make_context_projection(
    config: UNet2DConditionConfig, *, layers: LayerFactory
) -> ContextProjection | None:
    """What makes the context of text states and of an image's embedding."""
    kind = config.context_projection
    if kind is None:
        return None
    n_in, width = config.encoder_hid_dim or 0, config.per_block("cross_attention_dim")[0]
    if kind == "image_proj":
        return ImageProjection(n_in, width, layers=layers)
    if kind == "text_image_proj":
        return TextImageProjection(n_in, width, layers=layers)
    return layers.linear(n_in, width)


# The arguments that the config of a network needs or refuses.
CONDITIONING = (
    "context",
    "text_embeds",
    "image_embeds",
    "time_ids",
    "hint",
    "class_labels",
    "timestep_cond",
)


def conditioning_sizes(
    config: UNet2DConditionConfig, size: tuple[int, int], tokens: int | None, num_time_ids: int
) -> dict[str, tuple[Any, ...]]:
    """The shapes of the arguments that the network needs, of one image, by name.

    `size` is that of the noisy images, `tokens` the length of the context.
    """
    sizes: dict[str, tuple[Any, ...]] = {}
    if config.context_width is not None:
        sizes["context"] = (tokens, config.context_width)
    addition = config.addition_embed_type
    width = config.per_block("cross_attention_dim")[0]
    if addition == "text_time":
        embedded = num_time_ids * (config.addition_time_embed_dim or 0)
        pooled = (config.projection_class_embeddings_input_dim or 0) - embedded
        sizes |= {"text_embeds": (pooled,), "time_ids": (num_time_ids,)}
    if addition == "text_image":
        sizes["text_embeds"] = (width,)
    if addition == "text_image" or config.context_projection == "text_image_proj":
        sizes["image_embeds"] = (width,)
    elif addition in ("image", "image_hint") or config.context_projection == "image_proj":
        sizes["image_embeds"] = (config.encoder_hid_dim,)
    if addition == "image_hint":
        sizes["hint"] = (HINT_SCALE * size[0], HINT_SCALE * size[1], 3)
    if config.has_classes:
        kinds = {
            "identity": (config.time_width,),
            "projection": (config.projection_class_embeddings_input_dim,),
        }
        sizes["class_labels"] = kinds.get(config.class_embed_type or "", ())
    if config.time_cond_proj_dim is not None:
        sizes["timestep_cond"] = (config.time_cond_proj_dim,)
    return sizes
