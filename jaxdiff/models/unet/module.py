"""UNet2DConditionModel: the denoising network of Stable Diffusion 1, 2 and XL (and relatives)."""

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Dtype, Float, Int
from jaxdiff.core.validate import check_shape
from jaxdiff.models.unet.blocks import make_down_block, make_mid_block, make_up_block
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.nn.activations import activation
from jaxdiff.nn.embeddings import TimestepEmbedding, sinusoidal
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory

Sample = Float[Array, "b h w c"]
PAG_MID_BLOCKS = ("UNetMidBlock2DCrossAttn",)  # middle blocks whose self-attention can be off


class UNet2DConditionModel(nnx.Module):
    """A UNet with attention, conditioned on the timestep and, by its config, a context and more."""

    def __init__(
        self,
        config: UNet2DConditionConfig,
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
        channels, blocks = config.block_out_channels, range(len(config.block_out_channels))
        self.config = config
        self.dtype = dtype
        self.conv_in = layers.conv(config.in_channels, channels[0], config.conv_in_kernel)
        self.time_embedding = TimestepEmbedding(
            channels[0],
            config.time_width,
            layers=layers,
            act=config.act_fn,
            cond_width=config.time_cond_proj_dim,
        )
        added = config.projection_class_embeddings_input_dim if config.addition_embed_type else None
        self.add_embedding = (
            TimestepEmbedding(added, config.time_width, layers=layers) if added else None
        )
        self.down_blocks = nnx.List(make_down_block(config, i, layers=layers) for i in blocks)
        self.mid_block = make_mid_block(config, layers=layers)
        self.up_blocks = nnx.List(make_up_block(config, i, layers=layers) for i in blocks)
        self.conv_norm_out = layers.group_norm(
            channels[0], groups=config.norm_num_groups, eps=config.norm_eps
        )
        self.conv_out = layers.conv(
            channels[0], config.out_channels, config.conv_out_kernel, init=ZEROS
        )

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Float[Array, "b"] | Int[Array, "b"],
        context: Float[Array, "b n d"] | None = None,
        *,
        text_embeds: Float[Array, "b p"] | None = None,
        time_ids: Float[Array, "b k"] | Int[Array, "b k"] | None = None,
        timestep_cond: Float[Array, "b s"] | None = None,
        perturbed: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """The network's output for noisy latents, in the dtype of `sample`.

        `timesteps` count the steps of the training schedule. `context` (text states) is needed
        exactly when a block has cross-attention; `text_embeds` (pooled text) and `time_ids` (sizes
        and crops in pixels) exactly when addition_embed_type is "text_time"; `timestep_cond` (an
        embedded guidance scale) exactly when time_cond_proj_dim is given. InputError otherwise.
        Where `perturbed`, self-attention in the middle block is off (2403.17377).
        """
        self._check(sample, context, text_embeds, time_ids)
        _present("timestep_cond", timestep_cond, self.config.time_cond_proj_dim is not None)
        if perturbed is not None:
            self.check_perturbed()
        x = sample.astype(self.dtype)
        if self.config.center_input_sample:
            x = 2 * x - 1
        context = None if context is None else context.astype(self.dtype)
        time = self._embed_time(timesteps, timestep_cond, text_embeds, time_ids)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], time, context)
        x = skips[-1]
        if self.mid_block is not None:
            x = self.mid_block(x, time, context, perturbed)
        for block in self.up_blocks:
            used, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            # An odd resolution was rounded up on the way down; the skip below knows the right one.
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            x = block(x, time, context, skips=used, size=size)
        x = activation(self.config.act_fn)(self.conv_norm_out(x))
        return self.conv_out(x).astype(sample.dtype)

    def check_perturbed(self) -> None:
        """InputError for a UNet without attention that a guidance rule can perturb."""
        if self.mid_block is None or self.config.mid_block_type not in PAG_MID_BLOCKS:
            raise InputError(
                "guidance: got perturbed attention for a UNet without attention in its middle "
                "block, expected a UNet with it"
            )

    def _embed_time(
        self,
        timesteps: Array,
        timestep_cond: Array | None,
        text_embeds: Array | None,
        time_ids: Array | None,
    ) -> Float[Array, "b e"]:
        sines = self._sinusoidal(timesteps, self.config.block_out_channels[0])
        time = self.time_embedding(sines, timestep_cond)
        if self.add_embedding is None or text_embeds is None or time_ids is None:
            return time
        ids = self._sinusoidal(time_ids.reshape(-1), self.config.addition_time_embed_dim or 0)
        ids = ids.reshape(len(time_ids), -1)
        return time + self.add_embedding(
            jnp.concatenate([text_embeds.astype(jnp.float32), ids], axis=-1)
        )

    def _sinusoidal(self, values: Array, width: int) -> Float[Array, "n e"]:
        return sinusoidal(
            values,
            width,
            cos_first=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        )

    def _check(
        self,
        sample: Array,
        context: Array | None,
        text_embeds: Array | None,
        time_ids: Array | None,
    ) -> None:
        """Raise InputError unless the inputs are those that the config asks for."""
        config = self.config
        check_shape("sample", sample, (None, None, None, config.in_channels))
        _present("context", context, config.has_context)
        if context is not None:
            check_shape(
                "context", context, (len(sample), None, config.per_block("cross_attention_dim")[0])
            )
        added = config.addition_embed_type == "text_time"
        _present("text_embeds", text_embeds, added)
        _present("time_ids", time_ids, added)
        if text_embeds is not None and time_ids is not None:
            got = text_embeds.shape[-1] + time_ids.shape[-1] * (config.addition_time_embed_dim or 0)
            if got != config.projection_class_embeddings_input_dim:
                raise InputError(
                    f"text_embeds and embedded time_ids: got width {got}, "
                    f"expected {config.projection_class_embeddings_input_dim}"
                )


def _present(name: str, value: Array | None, wanted: bool) -> None:
    if (value is not None) != wanted:
        state = "an array" if wanted else "none for this model"
        raise InputError(f"{name}: got {'none' if value is None else 'an array'}, expected {state}")
