"""UNet2DConditionModel: the denoising network of Stable Diffusion, and of cascades and decoders."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Dtype, Float, Int
from jaxdiff.core.validate import check_shape
from jaxdiff.models.unet.blocks import make_down_block, make_mid_block, make_up_block
from jaxdiff.models.unet.conditioning import (
    CONDITIONING,
    ImageProjection,
    ImageTimeEmbedding,
    TextImageProjection,
    TextImageTimeEmbedding,
    TextTimeEmbedding,
    conditioning_sizes,
    make_added_embedding,
    make_class_embedding,
    make_context_projection,
)
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.unet_2d_config import UNet2DConfig
from jaxdiff.nn.activations import activation
from jaxdiff.nn.embeddings import TimestepEmbedding, sinusoidal
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.unet_2d_blocks import MidBlock2D

Sample = Float[Array, "b h w c"]
PAG_MID_BLOCKS = ("UNetMidBlock2DCrossAttn",)  # middle blocks whose self-attention can be off


class UNet2D(nnx.Module):
    """A UNet with attention, conditioned on the timestep and, by its config, a context and more."""

    def __init__(
        self,
        config: UNet2DConditionConfig | UNet2DConfig,
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
        self.config: Any = config
        config = self.unet_config
        channels, blocks = config.block_out_channels, range(len(config.block_out_channels))
        self.dtype = dtype
        self.conv_in = layers.conv(config.in_channels, channels[0], config.conv_in_kernel)
        self.time_embedding = TimestepEmbedding(
            channels[0],
            config.time_width,
            layers=layers,
            act=config.act_fn,
            cond_width=config.time_cond_proj_dim,
        )
        self.encoder_hid_proj = make_context_projection(config, layers=layers)
        self.class_embedding = make_class_embedding(config, layers=layers)
        self.add_embedding = make_added_embedding(config, layers=layers)
        self.down_blocks = nnx.List(make_down_block(config, i, layers=layers) for i in blocks)
        self.mid_block = self._make_mid_block(layers)
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
        context_mask: Bool[Array, "b _"] | None = None,
        text_embeds: Float[Array, "b p"] | None = None,
        image_embeds: Float[Array, "b i"] | None = None,
        time_ids: Float[Array, "b k"] | Int[Array, "b k"] | None = None,
        hint: Float[Array, "b h8 w8 3"] | None = None,
        class_labels: Float[Array, "b ..."] | Int[Array, "b"] | None = None,
        timestep_cond: Float[Array, "b s"] | None = None,
        perturbed: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """The network's output for noisy latents or pixels, in the dtype of `sample`.

        `timesteps` count the steps of the training schedule. The others are needed exactly where
        the config names them, InputError otherwise. `context` are text states, before a projection
        by encoder_hid_dim_type, which may also take `image_embeds`; `context_mask` may hide tokens
        of it, in SimpleCrossAttn blocks. By addition_embed_type: "text_time" takes
        `text_embeds` (pooled text) and `time_ids` (sizes and crops in pixels), "text_image"
        `text_embeds` and `image_embeds`, "image" `image_embeds` alone and "image_hint" a `hint`
        with it, pixels of eight times the latents' resolution. `class_labels` are class or
        noise-level numbers, or vectors for class_embed_type "projection" and "identity".
        `timestep_cond` (an embedded guidance scale) goes with time_cond_proj_dim.
        Where `perturbed`, self-attention in the middle block is off (2403.17377).
        """
        named = {
            "context": context,
            "text_embeds": text_embeds,
            "image_embeds": image_embeds,
            "time_ids": time_ids,
            "hint": hint,
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
        }
        given = {name: array for name, array in named.items() if array is not None}
        self._check(sample, given, context_mask)
        if perturbed is not None:
            self.check_perturbed()
        x = sample.astype(self.dtype)
        if self.unet_config.center_input_sample:
            x = 2 * x - 1
        if isinstance(self.add_embedding, ImageTimeEmbedding) and hint is not None:
            x = jnp.concatenate([x, self.add_embedding.encode_hint(hint)], axis=-1)
        time = self._embed_time(timesteps, given)
        context = self._project_context(given)
        if context_mask is not None and context is not None:
            # An image's tokens, which come first, are always seen.
            more = context.shape[1] - context_mask.shape[1]
            context_mask = jnp.pad(context_mask, ((0, 0), (more, 0)), constant_values=True)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], time, context, context_mask)
        x = skips[-1]
        if self.mid_block is not None:
            x = self.mid_block(x, time, context, context_mask, perturbed)
        for block in self.up_blocks:
            used, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            # An odd resolution was rounded up on the way down; the skip below knows the right one.
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            x = block(x, time, context, context_mask, skips=used, size=size)
        x = activation(self.unet_config.act_fn)(self.conv_norm_out(x))
        return self.conv_out(x).astype(sample.dtype)

    @property
    def unet_config(self) -> UNet2DConditionConfig:
        """Its config in the fields of UNet2DConditionModel."""
        return self.config

    def _make_mid_block(self, layers: LayerFactory) -> MidBlock2D | None:
        return make_mid_block(self.unet_config, layers=layers)

    def check_perturbed(self) -> None:
        """InputError for a UNet without attention that a guidance rule can perturb."""
        if self.mid_block is None or self.unet_config.mid_block_type not in PAG_MID_BLOCKS:
            raise InputError(
                "guidance: got perturbed attention for a UNet without attention in its middle "
                "block, expected a UNet with it"
            )

    def _embed_time(self, timesteps: Array, given: Mapping[str, Array]) -> Float[Array, "b e"]:
        """The embedding of the time, and of what joins it."""
        sines = self._sinusoidal(timesteps, self.unet_config.block_out_channels[0])
        time = self.time_embedding(sines, given.get("timestep_cond"))
        if "class_labels" in given:
            classes = self._embed_classes(given["class_labels"])
            together = self.unet_config.class_embeddings_concat
            time = jnp.concatenate([time, classes], axis=-1) if together else time + classes
        added = self._embed_addition(given)
        time = time if added is None else time + added
        act = self.unet_config.time_embedding_act_fn
        return time if act is None else activation(act)(time)

    def _embed_classes(self, labels: Array) -> Float[Array, "b e"]:
        if self.unet_config.class_embed_type == "timestep":
            labels = self._sinusoidal(labels, self.unet_config.block_out_channels[0])
        if self.class_embedding is None:
            return labels.astype(self.dtype)
        return self.class_embedding(labels)

    def _embed_addition(self, given: Mapping[str, Array]) -> Float[Array, "b e"] | None:
        """The embedding of what addition_embed_type names."""
        embedding = self.add_embedding
        if embedding is None:
            return None
        if isinstance(embedding, TextTimeEmbedding):
            return embedding(given["context"])
        if isinstance(embedding, TextImageTimeEmbedding):
            return embedding(given["text_embeds"], given["image_embeds"])
        if isinstance(embedding, ImageTimeEmbedding):
            return embedding(given["image_embeds"])
        ids = given["time_ids"]
        sines = self._sinusoidal(ids.reshape(-1), self.unet_config.addition_time_embed_dim or 0)
        vectors = [given["text_embeds"].astype(jnp.float32), sines.reshape(len(ids), -1)]
        return embedding(jnp.concatenate(vectors, axis=-1))

    def _project_context(self, given: Mapping[str, Array]) -> Float[Array, "b m d"] | None:
        """The tokens that the blocks attend to."""
        projection = self.encoder_hid_proj
        if isinstance(projection, ImageProjection):
            return projection(given["image_embeds"])
        if "context" not in given:
            return None
        context = given["context"]
        if isinstance(projection, TextImageProjection):
            return projection(context, given["image_embeds"])
        return context.astype(self.dtype) if projection is None else projection(context)

    def _sinusoidal(self, values: Array, width: int) -> Float[Array, "n e"]:
        return sinusoidal(
            values,
            width,
            cos_first=self.unet_config.flip_sin_to_cos,
            freq_shift=self.unet_config.freq_shift,
        )

    def _check(self, sample: Array, given: Mapping[str, Array], context_mask: Array | None) -> None:
        """Raise InputError unless the inputs are those that the config asks for."""
        config = self.unet_config
        check_shape("sample", sample, (None, None, None, config.in_channels - config.hint_channels))
        batch, rows, columns = sample.shape[:3]
        if rows % config.size_divisor or columns % config.size_divisor:
            raise InputError(
                f"sample: got {rows} rows and {columns} columns, expected multiples of "
                f"{config.size_divisor}"
            )
        num_time_ids = given["time_ids"].shape[-1] if "time_ids" in given else 0
        sizes = conditioning_sizes(config, (rows, columns), None, num_time_ids)
        for name in CONDITIONING:
            _present(name, given.get(name), name in sizes)
        if config.addition_embed_type == "text_time":
            embedded = num_time_ids * (config.addition_time_embed_dim or 0)
            got = given["text_embeds"].shape[-1] + embedded
            if got != config.projection_class_embeddings_input_dim:
                raise InputError(
                    f"text_embeds and embedded time_ids: got width {got}, "
                    f"expected {config.projection_class_embeddings_input_dim}"
                )
        for name, array in given.items():
            check_shape(name, array, (batch, *sizes[name]))
        if context_mask is not None:
            _present("context_mask", context_mask, config.masks_context and "context" in given)
            check_shape("context_mask", context_mask, given["context"].shape[:2])


class UNet2DConditionModel(UNet2D):
    """A UNet whose config is that of diffusers' class of this name."""

    config: UNet2DConditionConfig


def _present(name: str, value: Array | None, wanted: bool) -> None:
    if (value is not None) != wanted:
        state = "an array" if wanted else "none for this model"
        raise InputError(f"{name}: got {'none' if value is None else 'an array'}, expected {state}")
