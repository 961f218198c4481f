"""What stands between CLIP's image embeddings and a decoder of them (unCLIP, 2204.06125).

The projection of Karlo, which makes the decoder's context, and the statistics of Stable unCLIP's
embeddings; parameter names are diffusers'.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Dtype, Float
from jaxdiff.core.validate import check_shape, positive
from jaxdiff.nn.initializers import ONES, ZEROS
from jaxdiff.nn.layers import LayerFactory


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnCLIPTextProjConfig:
    """The fields of a diffusers UnCLIPTextProjModel config.json, with its defaults.

    InputError for sizes below one.
    """

    clip_extra_context_tokens: int = 4  # tokens of the context that an image makes
    clip_embeddings_dim: int = 768  # of the embeddings of image and text, and of the text states
    time_embed_dim: int  # of the decoder's time embedding
    cross_attention_dim: int  # of the decoder's context

    def __post_init__(self) -> None:
        """Refuse what UnCLIPTextProjModel cannot do."""
        for field in dataclasses.fields(self):
            positive(field.name, getattr(self, field.name))


class UnCLIPTextProjModel(nnx.Module):
    """The context of a decoder and the vector that joins its time embedding (section 2.1)."""

    def __init__(
        self,
        config: UnCLIPTextProjConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        self.config = config
        self.dtype = dtype
        n_in, width = config.clip_embeddings_dim, config.cross_attention_dim
        self.learned_classifier_free_guidance_embeddings = layers.param(ZEROS, (n_in,))
        self.embedding_proj = layers.linear(n_in, config.time_embed_dim)
        self.clip_image_embeddings_project_to_time_embeddings = layers.linear(
            n_in, config.time_embed_dim
        )
        self.clip_extra_context_tokens_proj = layers.linear(
            n_in, config.clip_extra_context_tokens * width
        )
        self.encoder_hidden_states_proj = layers.linear(n_in, width)
        self.text_encoder_hidden_states_norm = layers.layer_norm(width)

    def __call__(
        self,
        image_embeds: Float[Array, "b d"],
        text_embeds: Float[Array, "b d"],
        states: Float[Array, "b n d"],
    ) -> tuple[Float[Array, "b m c"], Float[Array, "b t"]]:
        """The context, tokens of the image first, and class labels of an "identity" embedding.

        `text_embeds` are the pooled text embeddings, `states` the text states. InputError for
        other widths than the config says.
        """
        b, n_in = len(image_embeds), self.config.clip_embeddings_dim
        check_shape("image_embeds", image_embeds, (b, n_in))
        check_shape("text_embeds", text_embeds, (b, n_in))
        check_shape("states", states, (b, None, n_in))
        time = self.clip_image_embeddings_project_to_time_embeddings(image_embeds)
        time = time + self.embedding_proj(text_embeds)
        tokens = self.clip_extra_context_tokens_proj(image_embeds)
        tokens = tokens.reshape(b, -1, self.config.clip_extra_context_tokens).swapaxes(1, 2)
        states = self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(states))
        return jnp.concatenate([tokens, states], axis=1), time

    def null_image_embeds(self, batch: int) -> Float[Array, "b d"]:
        """What guidance has in place of images' embeddings: a learned one for each."""
        learned = self.learned_classifier_free_guidance_embeddings[...].astype(self.dtype)
        return jnp.broadcast_to(learned[None], (batch, *learned.shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableUnCLIPImageNormalizerConfig:
    """The fields of a diffusers StableUnCLIPImageNormalizer config.json, with its defaults.

    InputError for a width below one.
    """

    embedding_dim: int = 768

    def __post_init__(self) -> None:
        """Refuse what StableUnCLIPImageNormalizer cannot do."""
        positive("embedding_dim", self.embedding_dim)


class StableUnCLIPImageNormalizer(nnx.Module):
    """Mean and standard deviation of image embeddings, between which noise is added to them."""

    def __init__(
        self,
        config: StableUnCLIPImageNormalizerConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        self.config = config
        self.dtype = dtype
        self.mean = layers.param(ZEROS, (1, config.embedding_dim))
        self.std = layers.param(ONES, (1, config.embedding_dim))

    def normalise(self, embeddings: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """Embeddings of zero mean and unit variance, in float32."""
        mean, std = (each[...].astype(jnp.float32) for each in (self.mean, self.std))
        return (embeddings.astype(jnp.float32) - mean) / std

    def denormalise(self, normed: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """The inverse of `normalise`."""
        mean, std = (each[...].astype(jnp.float32) for each in (self.mean, self.std))
        return normed.astype(jnp.float32) * std + mean
