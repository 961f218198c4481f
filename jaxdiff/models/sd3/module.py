"""SD3Transformer2DModel: the MMDiT of Stable Diffusion 3 and 3.5 (2403.03206)."""

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Dtype, Float, Int
from jaxdiff.core.validate import check_shape
from jaxdiff.models.sd3.blocks import JointTransformerBlock, TimeTextEmbedding
from jaxdiff.models.sd3.config import SD3Transformer2DConfig
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.modulation import AdaLayerNormContinuous
from jaxdiff.nn.patches import PatchEmbed, unpatchify


class SD3Transformer2DModel(nnx.Module):
    """A transformer over patches of latents and tokens of text, each with weights of its own."""

    def __init__(
        self,
        config: SD3Transformer2DConfig,
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
        depth, (_, channels) = config.num_layers, config.channels
        self.config = config
        self.dtype = dtype
        self.pos_embed = PatchEmbed(
            config.in_channels,
            config.width,
            config.patch_size,
            layers=layers,
            base=config.sample_size // config.patch_size,
            max_size=config.pos_embed_max_size,
        )
        self.time_text_embed = TimeTextEmbedding(config, layers=layers)
        self.context_embedder = layers.linear(config.joint_attention_dim, config.width)
        self.transformer_blocks = nnx.List(
            JointTransformerBlock(
                config,
                layers=layers,
                dual=i in config.dual_attention_layers,
                last=i == depth - 1,
            )
            for i in range(depth)
        )
        self.norm_out = AdaLayerNormContinuous(config.width, config.width, layers=layers)
        self.proj_out = layers.linear(config.width, config.patch_size**2 * channels, init=ZEROS)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Float[Array, "b"] | Int[Array, "b"],
        context: Float[Array, "b n e"],
        *,
        pooled_projections: Float[Array, "b p"],
    ) -> Float[Array, "b h w o"]:
        """The velocity for noisy latents, in the dtype of `sample`.

        `timesteps` run from 0 (image) to 1000 (noise). `context` has the text tokens and
        `pooled_projections` the pooled embedding. InputError for other widths than the config's,
        and for a size that is no multiple of the patches or larger than the grid of positions.
        """
        config = self.config
        check_shape("sample", sample, (None, None, None, config.in_channels))
        check_shape("context", context, (len(sample), None, config.joint_attention_dim))
        check_shape(
            "pooled_projections", pooled_projections, (len(sample), config.pooled_projection_dim)
        )
        grid = self.pos_embed.grid((sample.shape[1], sample.shape[2]))
        x = self.pos_embed(sample)
        vector = self.time_text_embed(timesteps, pooled_projections)
        text = self.context_embedder(context)
        for block in self.transformer_blocks:
            x, text = block(x, text, vector)
        tokens = self.proj_out(self.norm_out(x, vector))
        return unpatchify(tokens, grid, config.patch_size).astype(sample.dtype)
