"""SD3Transformer2DModel: the MMDiT of Stable Diffusion 3 and 3.5 (2403.03206)."""

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Dtype, Float, Int
from jaxdiff.core.validate import check_shape
from jaxdiff.models.sd3.blocks import JointTransformerBlock, TimeTextEmbedding
from jaxdiff.models.sd3.config import SD3Transformer2DConfig
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.modulation import AdaLayerNormContinuous
from jaxdiff.nn.patches import PatchEmbed, unpatchify

# Skipped where a stream is perturbed, as Stability AI does it for 3.5 medium (skip-layer guidance).
SKIPPED_BLOCKS = (7, 8, 9)


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
        perturbed: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """The velocity for noisy latents, in the dtype of `sample`.

        `timesteps` run from 0 (image) to 1000 (noise). `context` has the text tokens and
        `pooled_projections` the pooled embedding. Where `perturbed`, SKIPPED_BLOCKS are skipped.
        InputError for other widths than the config's, and for a size that is no multiple of the
        patches or larger than the grid of positions.
        """
        config = self.config
        check_shape("sample", sample, (None, None, None, config.in_channels))
        check_shape("context", context, (len(sample), None, config.joint_attention_dim))
        check_shape(
            "pooled_projections", pooled_projections, (len(sample), config.pooled_projection_dim)
        )
        if perturbed is not None:
            self.check_perturbed()
        grid = self.pos_embed.grid((sample.shape[1], sample.shape[2]))
        x = self.pos_embed(sample)
        vector = self.time_text_embed(timesteps, pooled_projections)
        text = self.context_embedder(context)
        for i, block in enumerate(self.transformer_blocks):
            before, (x, text) = (x, text), block(x, text, vector)
            if perturbed is not None and i in SKIPPED_BLOCKS:
                skipped = perturbed[:, None, None]
                x, text = jnp.where(skipped, before[0], x), jnp.where(skipped, before[1], text)
        tokens = self.proj_out(self.norm_out(x, vector))
        return unpatchify(tokens, grid, config.patch_size).astype(sample.dtype)

    def check_perturbed(self) -> None:
        """InputError for a transformer with too few blocks to skip some of them."""
        depth = self.config.num_layers
        if depth <= max(SKIPPED_BLOCKS):
            raise InputError(
                f"guidance: got a perturbed stream for a transformer of {depth} blocks, expected "
                f"more than {max(SKIPPED_BLOCKS)}, of which it skips some"
            )
