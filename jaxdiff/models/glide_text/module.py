"""GlideTextModel: the transformer that reads the text in GLIDE (2112.10741, section 4).

It is trained with the network that denoises, and has no causal mask: padding takes part, as vectors
of its own by position. The state of the last position is the pooled embedding.
"""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float, Int
from jaxdiff.core.validate import in_range
from jaxdiff.models.clip import TransformerLayers
from jaxdiff.models.glide_text.config import GlideTextConfig
from jaxdiff.models.text_encoder import TextFeatures
from jaxdiff.nn.layers import LayerFactory


class _Embeddings(nnx.Module):
    def __init__(self, config: GlideTextConfig, *, layers: LayerFactory):
        positions, width = config.max_position_embeddings, config.hidden_size
        self.token_embedding = layers.embed(config.vocab_size, width)
        self.position_embedding = layers.embed(positions, width, std=0.01)
        self.padding_embedding = layers.embed(positions, width)
        self.pad = config.pad_token_id

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        places = jnp.arange(ids.shape[1])
        text = self.token_embedding(ids) + self.position_embedding(places)[None]
        return jnp.where((ids != self.pad)[..., None], text, self.padding_embedding(places)[None])


class GlideTextModel(nnx.Module):
    """The text encoder, with the projection of its pooled embedding."""

    token_embedding: ClassVar[str] = "embeddings.token_embedding.embedding"

    def __init__(
        self,
        config: GlideTextConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        self.config = config
        self.embeddings = _Embeddings(config, layers=layers)
        self.encoder = TransformerLayers(config.layers, layers=layers)
        self.final_layer_norm = layers.layer_norm(config.hidden_size)
        self.text_projection = layers.linear(config.hidden_size, config.projection_dim)

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Last hidden state after the final norm, in the compute dtype."""
        return self.features(ids).last

    def features(self, ids: Int[Array, "b n"], skip: int = 0) -> TextFeatures:
        """Last states and the pooled embedding, in the compute dtype.

        `skip` leaves out layers at the end of the states, 0 to depth - 1. InputError unless there
        are max_position_embeddings tokens, padding included.
        """
        in_range("clip_skip", skip, 0, self.config.num_hidden_layers - 1)
        if ids.shape[1] != self.config.max_position_embeddings:
            raise InputError(
                f"ids: got {ids.shape[1]} tokens, expected {self.config.max_position_embeddings}"
            )
        states = self.encoder(self.embeddings(ids), causal=False)
        whole = self.final_layer_norm(states[-1])
        last = whole if skip == 0 else self.final_layer_norm(states[-1 - skip])
        mask = ids != self.config.pad_token_id
        return TextFeatures(last, pooled=self.text_projection(whole[:, -1]), mask=mask)

    def unused_parameters(self, layer: str, pooled: bool) -> tuple[str, ...]:
        """Path prefixes of weights that neither the states nor `pooled` depend on."""
        del layer
        return () if pooled else ("text_projection.",)
