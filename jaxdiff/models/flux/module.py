"""FluxTransformer2DModel: the denoising transformer of FLUX.1."""

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float
from jaxdiff.core.validate import check_shape
from jaxdiff.models.flux.blocks import (
    DoubleBlock,
    Modulation,
    SingleBlock,
    pack,
    position_ids,
    unpack,
)
from jaxdiff.models.flux.config import PATCH, FluxTokensConfig, FluxTransformer2DConfig
from jaxdiff.nn.embeddings import TimestepEmbedding, sinusoidal
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.modulation import modulated_norm
from jaxdiff.nn.remat import remat
from jaxdiff.nn.rotary import Rotation, rotation

TIME_CHANNELS = 256  # of the sines and cosines of time and guidance
GUIDANCE_FACTOR = 1000.0  # guidance scales are embedded on the scale of times


class FluxTransformerBlock(DoubleBlock):
    """A double block that makes its modulation of the embedding of time, guidance and text."""

    def __init__(self, config: FluxTokensConfig, *, layers: LayerFactory):
        super().__init__(config, layers=layers)
        self.norm1 = Modulation(config.width, 6, layers=layers)
        self.norm1_context = Modulation(config.width, 6, layers=layers)

    @remat
    def __call__(
        self,
        image: Float[Array, "b n d"],
        text: Float[Array, "b m d"],
        embedding: Float[Array, "b d"],
        by: Rotation,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b m d"]]:
        """Image and text after the block."""
        own = self.norm1(embedding), self.norm1_context(embedding)
        return self.modulated(image, text, *own, by)


class FluxSingleTransformerBlock(SingleBlock):
    """A single block that makes its modulation of the embedding of time, guidance and text."""

    def __init__(self, config: FluxTokensConfig, *, layers: LayerFactory):
        super().__init__(config, layers=layers)
        self.norm = Modulation(config.width, 3, layers=layers)

    @remat
    def __call__(
        self, x: Float[Array, "b n d"], embedding: Float[Array, "b d"], by: Rotation
    ) -> Float[Array, "b n d"]:
        """Tokens after the block."""
        return self.modulated(x, self.norm(embedding), by)


class TimeTextEmbedding(nnx.Module):
    """The sum of the embeddings of time, guidance scale and pooled text."""

    def __init__(self, config: FluxTransformer2DConfig, *, layers: LayerFactory):
        width = config.width
        self.timestep_embedder = TimestepEmbedding(TIME_CHANNELS, width, layers=layers)
        self.guidance_embedder = (
            TimestepEmbedding(TIME_CHANNELS, width, layers=layers)
            if config.guidance_embeds
            else None
        )
        self.text_embedder = TimestepEmbedding(config.pooled_projection_dim, width, layers=layers)

    def __call__(
        self,
        timesteps: Float[Array, "b"],
        pooled_projections: Float[Array, "b p"],
        guidance: Float[Array, "b"] | None,
    ) -> Float[Array, "b d"]:
        """The embedding, in the compute dtype."""
        out = self.timestep_embedder(sinusoidal(timesteps, TIME_CHANNELS))
        if self.guidance_embedder is not None and guidance is not None:
            scales = sinusoidal(GUIDANCE_FACTOR * guidance, TIME_CHANNELS)
            out = out + self.guidance_embedder(scales)
        return out + self.text_embedder(pooled_projections)


class FluxTransformer2DModel(nnx.Module):
    """FLUX.1: a transformer over tokens of text and of 2 x 2 latents, with rotary positions."""

    def __init__(
        self,
        config: FluxTransformer2DConfig,
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
        width = config.width
        self.config = config
        self.dtype = dtype
        self.time_text_embed = TimeTextEmbedding(config, layers=layers)
        self.context_embedder = layers.linear(config.joint_attention_dim, width)
        self.x_embedder = layers.linear(config.in_channels, width)
        self.transformer_blocks = nnx.List(
            FluxTransformerBlock(config, layers=layers) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nnx.List(
            FluxSingleTransformerBlock(config, layers=layers)
            for _ in range(config.num_single_layers)
        )
        self.norm_out = Modulation(width, 2, layers=layers)
        self.proj_out = layers.linear(width, config.token_channels, init=ZEROS)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Float[Array, "b"],
        context: Float[Array, "b m e"],
        *,
        pooled_projections: Float[Array, "b p"],
        guidance: Float[Array, "b"] | None = None,
        reference: Float[Array, "b h2 w2 o"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """The velocity, noise minus image, of noisy latents, in the dtype of `sample`.

        Sides are even; the channels of `sample` are a quarter of in_channels. `timesteps` go from
        0 (image) to 1000 (noise). `context` are text states, `pooled_projections` is the pooled
        embedding; `guidance` (the scale) is needed exactly when guidance_embeds is true. Tokens of
        the latents `reference` follow those of the image, as image 1 (FLUX.1 Kontext, 2506.15742).
        InputError otherwise.
        """
        self._check(sample, context, pooled_projections, guidance)
        h, w = sample.shape[1:3]
        sizes, tokens = [(h, w)], [pack(sample)]
        if reference is not None:
            check_sides("reference", reference)
            sizes.append((reference.shape[1], reference.shape[2]))
            tokens.append(pack(reference.astype(sample.dtype)))
        x = self.x_embedder(jnp.concatenate(tokens, axis=1))
        text = self.context_embedder(context)
        embedding = self.time_text_embed(timesteps, pooled_projections, guidance)
        m, n = text.shape[1], tokens[0].shape[1]
        grids = tuple((height // PATCH, width // PATCH) for height, width in sizes)
        by = rotation(position_ids(m, grids), self.config.axes_dims_rope)
        for block in self.transformer_blocks:
            x, text = block(x, text, embedding, by)
        x = jnp.concatenate([text, x], axis=1)
        for block in self.single_transformer_blocks:
            x = block(x, embedding, by)
        modulation = self.norm_out(embedding)
        x = modulated_norm(x[:, m : m + n], shift=modulation[:, 1], scale=modulation[:, 0])
        return unpack(self.proj_out(x), (h, w)).astype(sample.dtype)

    def _check(
        self, sample: Array, context: Array, pooled_projections: Array, guidance: Array | None
    ) -> None:
        """Raise InputError unless the inputs are those that the config asks for."""
        config, b = self.config, len(sample)
        check_tokens(config, sample, context)
        check_shape("pooled_projections", pooled_projections, (b, config.pooled_projection_dim))
        if (guidance is not None) != config.guidance_embeds:
            got, wanted = ("none", "a scale") if guidance is None else ("a scale", "none")
            raise InputError(f"guidance: got {got}, expected {wanted} for this model")


def check_tokens(config: FluxTokensConfig, sample: Array, context: Array) -> None:
    """InputError for latents or text states that a network of this config does not take."""
    check_shape("sample", sample, (None, None, None, config.in_channels // PATCH**2))
    check_sides("sample", sample)
    check_shape("context", context, (len(sample), None, config.joint_attention_dim))


def check_sides(name: str, latents: Float[Array, "b h w c"]) -> None:
    """InputError unless height and width can be cut into tokens."""
    if any(side % PATCH for side in latents.shape[1:3]):
        raise InputError(
            f"{name}: got {latents.shape[1]} x {latents.shape[2]} latents, expected multiples of "
            f"{PATCH}"
        )
