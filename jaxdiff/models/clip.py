"""CLIP's text and vision transformers (Radford et al. 2021), with transformers' parameter names."""

from typing import ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float, Int
from jaxdiff.core.validate import check_shape, in_range
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.models.text_encoder import TextFeatures, check_tokens
from jaxdiff.nn.activations import activation
from jaxdiff.nn.attention import attention
from jaxdiff.nn.initializers import Constant, Normal
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.transformer import split_heads

LEGACY_EOS = 2  # what old configs say, whatever the tokenizer
TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.embedding"  # its path
LOGIT_SCALE = 2.6592  # log(1 / 0.07), the initial inverse temperature


class VisionFeatures(NamedTuple):
    """What the vision tower says of an image."""

    last: Float[Array, "b n d"]  # class token, then patches, after the last layer, not normed
    pooled: Float[Array, "b p"]  # the normed class token, projected if the model projects


class _Attention(nnx.Module):
    def __init__(self, width: int, heads: int, depth: int, *, layers: LayerFactory):
        std = width**-0.5
        into = Normal(std * (2 * depth) ** -0.5)
        self.q_proj = layers.linear(width, width, init=into)
        self.k_proj = layers.linear(width, width, init=into)
        self.v_proj = layers.linear(width, width, init=into)
        self.out_proj = layers.linear(width, width, init=Normal(std))
        self.heads = heads
        self.backend = layers.attention

    def __call__(self, x: Float[Array, "b n d"], *, causal: bool) -> Float[Array, "b n d"]:
        q, k, v = (split_heads(f(x), self.heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        out = attention(q, k, v, causal=causal, backend=self.backend)
        return self.out_proj(out.reshape(x.shape))


class _MLP(nnx.Module):
    def __init__(self, width: int, inner: int, depth: int, act: str, *, layers: LayerFactory):
        self.fc1 = layers.linear(width, inner, init=Normal((2 * width) ** -0.5))
        self.fc2 = layers.linear(inner, width, init=Normal((2 * depth * width) ** -0.5))
        self.act = act

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.fc2(activation(self.act)(self.fc1(x)))


class _Layer(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, layers: LayerFactory):
        d, depth = config.hidden_size, config.num_hidden_layers
        self.layer_norm1 = layers.layer_norm(d, eps=config.layer_norm_eps)
        self.self_attn = _Attention(d, config.num_attention_heads, depth, layers=layers)
        self.layer_norm2 = layers.layer_norm(d, eps=config.layer_norm_eps)
        self.mlp = _MLP(d, config.intermediate_size, depth, config.hidden_act, layers=layers)

    def __call__(self, x: Float[Array, "b n d"], *, causal: bool) -> Float[Array, "b n d"]:
        x = x + self.self_attn(self.layer_norm1(x), causal=causal)
        return x + self.mlp(self.layer_norm2(x))


class TransformerLayers(nnx.Module):
    """The layers of a transformer, each of attention and a perceptron after layer norms."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, layers: LayerFactory):
        depth = range(config.num_hidden_layers)
        self.layers = nnx.List(_Layer(config, layers=layers) for _ in depth)

    def __call__(self, x: Float[Array, "b n d"], *, causal: bool) -> list[Float[Array, "b n d"]]:
        """The states before the first layer and after each."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], causal=causal))
        return states


class _TextEmbeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, layers: LayerFactory):
        self.token_embedding = layers.embed(config.vocab_size, config.hidden_size)
        self.position_embedding = layers.embed(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))[None]


class TextTransformer(nnx.Module):
    """The causal text transformer shared by CLIPTextModel and CLIPModel."""

    def __init__(self, config: CLIPTextConfig, *, layers: LayerFactory):
        self.config = config
        self.embeddings = _TextEmbeddings(config, layers=layers)
        self.encoder = TransformerLayers(config, layers=layers)
        self.final_layer_norm = layers.layer_norm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, ids: Int[Array, "b n"], skip: int = 0) -> TextFeatures:
        """Features with `pooled` not projected; InputError if there are too many tokens.

        `skip` layers at the end count for `pooled` only.
        """
        in_range("clip_skip", skip, 0, self.config.num_hidden_layers - 1)
        check_tokens(ids, self.config.max_position_embeddings)
        states = self.encoder(self.embeddings(ids), causal=True)
        whole = self.final_layer_norm(states[-1])
        last = whole if skip == 0 else self.final_layer_norm(states[-1 - skip])
        pooled = jnp.take_along_axis(whole, self._end(ids)[:, None, None], axis=1)[:, 0]
        mask = jnp.arange(ids.shape[1])[None] <= self._end(ids)[:, None]
        return TextFeatures(last, states[-2 - skip], pooled, mask)

    def _end(self, ids: Int[Array, "b n"]) -> Int[Array, "b"]:
        """Position of the end-of-text token.

        Old configs name the wrong token (2); the right one is then the largest id of the text,
        added tokens left out.
        """
        if self.config.eos_token_id == LEGACY_EOS:
            return jnp.argmax(jnp.where(ids < self.config.vocab_size, ids, -1), axis=-1)
        return jnp.argmax(ids == self.config.eos_token_id, axis=-1)


class CLIPTextModel(nnx.Module):
    """CLIP's text encoder; `with_projection` adds the map into the space shared with images."""

    token_embedding: ClassVar[str] = TOKEN_EMBEDDING

    def __init__(
        self,
        config: CLIPTextConfig,
        with_projection: bool = False,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        self.config = config
        self.text_model = TextTransformer(config, layers=layers)
        widths = config.hidden_size, config.projection_dim
        self.text_projection = _projection(*widths, layers) if with_projection else None

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Last hidden state after the final norm, in the compute dtype."""
        return self.text_model(ids).last

    def features(self, ids: Int[Array, "b n"], skip: int = 0) -> TextFeatures:
        """Last and penultimate states and the pooled vector, in the compute dtype.

        `skip` leaves out layers at the end of the states ("clip skip"), 0 to depth - 1.
        """
        features = self.text_model(ids, skip)
        if self.text_projection is None:
            return features
        return features._replace(pooled=self.text_projection(cast(Array, features.pooled)))

    def unused_parameters(self, layer: str, pooled: bool) -> tuple[str, ...]:
        """Path prefixes of weights that neither the states of `layer` nor `pooled` depend on."""
        if pooled:
            return ()
        if layer == "last":
            return ("text_projection.",)
        names = (f"encoder.layers.{self.config.num_hidden_layers - 1}.", "final_layer_norm.")
        return ("text_projection.", *(f"text_model.{name}" for name in names))


class _VisionEmbeddings(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, layers: LayerFactory):
        d = config.hidden_size
        steps = config.noise_steps
        shape = (d,) if steps is None else (steps, d)
        self.class_embedding = layers.param(Normal(d**-0.5), shape)
        self.patch_embedding = layers.conv(
            config.num_channels,
            d,
            config.patch_size,
            stride=config.patch_size,
            padding=((0, 0), (0, 0)),
            bias=False,
            init=Normal(0.02),
        )
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.position_embedding = layers.embed(tokens, d)

    def __call__(
        self, images: Float[Array, "b h w c"], timesteps: Int[Array, "b"] | None = None
    ) -> Float[Array, "b n d"]:
        patches = self.patch_embedding(images)
        b, *_, d = patches.shape
        first = self.class_embedding[...].astype(patches.dtype)
        if timesteps is not None:
            first = first[timesteps][:, None]
        tokens = jnp.concatenate(
            [jnp.broadcast_to(first, (b, 1, d)), patches.reshape(b, -1, d)], axis=1
        )
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))[None]


class VisionTransformer(nnx.Module):
    """The vision transformer shared by CLIPVisionModel and CLIPModel."""

    def __init__(self, config: CLIPVisionConfig, *, layers: LayerFactory):
        self.config = config
        self.embeddings = _VisionEmbeddings(config, layers=layers)
        # The spelling is that of every checkpoint.
        self.pre_layrnorm = layers.layer_norm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = TransformerLayers(config, layers=layers)
        self.post_layernorm = layers.layer_norm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(
        self, images: Float[Array, "b h w c"], timesteps: Int[Array, "b"] | None = None
    ) -> VisionFeatures:
        """Features with `pooled` not projected; InputError if the images have another size.

        A tower for noisy images needs the `timesteps` of their noise.
        """
        last = self.states(images, timesteps)[-1]
        return VisionFeatures(last, self.post_layernorm(last[:, 0]))

    def states(
        self, images: Float[Array, "b h w c"], timesteps: Int[Array, "b"] | None = None
    ) -> list[Float[Array, "b n d"]]:
        """Class token, then patches, before the first layer and after each; not normed."""
        side = self.config.image_size
        check_shape("images", images, (None, side, side, self.config.num_channels))
        if (timesteps is None) != (self.config.noise_steps is None):
            got, expected = ("none", "some") if timesteps is None else ("some", "none")
            kind = "noisy images" if timesteps is None else "images without noise"
            raise InputError(f"timesteps: got {got}, expected {expected} for a CLIP of {kind}")
        return self.encoder(self.pre_layrnorm(self.embeddings(images, timesteps)), causal=False)


class CLIPVisionModel(nnx.Module):
    """CLIP's image encoder; `with_projection` adds the map into the space shared with texts."""

    def __init__(
        self,
        config: CLIPVisionConfig,
        with_projection: bool = False,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        self.config = config
        self.vision_model = VisionTransformer(config, layers=layers)
        widths = config.hidden_size, config.projection_dim
        self.visual_projection = _projection(*widths, layers) if with_projection else None

    def __call__(self, images: Float[Array, "b h w c"]) -> VisionFeatures:
        """Features of images that are already resized and normalised as the model expects."""
        features = self.vision_model(images)
        if self.visual_projection is None:
            return features
        return features._replace(pooled=self.visual_projection(features.pooled))


class CLIPModel(nnx.Module):
    """Both encoders and the temperature: what contrastive training learns."""

    def __init__(
        self,
        text_config: CLIPTextConfig,
        vision_config: CLIPVisionConfig,
        projection_dim: int = 512,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        self.text_model = TextTransformer(text_config, layers=layers)
        self.vision_model = VisionTransformer(vision_config, layers=layers)
        self.text_projection = _projection(text_config.hidden_size, projection_dim, layers)
        self.visual_projection = _projection(vision_config.hidden_size, projection_dim, layers)
        self.logit_scale = layers.param(Constant(LOGIT_SCALE), ())

    def text_embeds(self, ids: Int[Array, "b n"]) -> Float[Array, "b p"]:
        """Texts as unit vectors, in float32."""
        return unit(self.text_projection(cast(Array, self.text_model(ids).pooled)))

    def image_embeds(
        self, images: Float[Array, "b h w c"], timesteps: Int[Array, "b"] | None = None
    ) -> Float[Array, "b p"]:
        """Images as unit vectors, in float32; noisy ones by the `timesteps` of their noise."""
        return unit(self.visual_projection(self.vision_model(images, timesteps).pooled))


def extend_token_embedding(
    table: Float[Array, "v d"], first: int, vectors: Float[Array, "n d"]
) -> Float[Array, "w d"]:
    """The token embedding with new vectors from the id `first` on, in the table's dtype.

    Ids between the end of the table and the first new token are unused; their vectors are zero.
    """
    gap = jnp.zeros((max(0, first - len(table)), table.shape[1]), table.dtype)
    return jnp.concatenate([table[:first], gap, vectors.astype(table.dtype)])


def _projection(n_in: int, n_out: int | None, layers: LayerFactory):
    if n_out is None:
        raise InputError("projection_dim: got null, expected a width")
    return layers.linear(n_in, n_out, bias=False, init=Normal(n_in**-0.5))


def unit(x: Float[Array, "b p"]) -> Float[Array, "b p"]:
    """Vectors at length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True))
