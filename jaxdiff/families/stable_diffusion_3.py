"""Stable Diffusion 3 and 3.5: an MMDiT on latents of 16 channels, a flow, and three text encoders.

The penultimate hidden states of two CLIPs stand side by side, padded with zeros to the width of
T5's, which follow them as further tokens; the pooled embedding is that of both CLIPs (2403.03206,
section 4). In training each encoder's output was zeros for 46% of the texts, so a model may lack
any of them: its output then is zeros.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float
from jaxdiff.families.base import Family, TextEncoder, TextEncoderOutput
from jaxdiff.families.components import required_component
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.sd3.adapter import SD3Adapter
from jaxdiff.models.sd3.config import SD3Transformer2DConfig
from jaxdiff.models.sd3.module import SD3Transformer2DModel
from jaxdiff.models.text_encoder import TextModel
from jaxdiff.models.vae import AutoencoderKL

PIPELINE_CLASSES = tuple(f"StableDiffusion3{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))
CLIP_TOKENS = 77
T5_TOKENS = 256

_CLIP = TextEncoder(layer="penultimate", pooled=True, max_chunks=1, prompt=1)
CLIP_L = _CLIP
CLIP_G = dataclasses.replace(_CLIP, component="text_encoder_2", tokenizer="tokenizer_2", prompt=2)
T5 = TextEncoder(
    component="text_encoder_3",
    tokenizer="tokenizer_3",
    length=T5_TOKENS,
    max_length=512,
    max_chunks=1,
    prompt=3,
    skips_layers=False,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinCLIPAndT5:
    """The outputs of the text encoders that are there as one, zeros for the others."""

    width: int = 4096  # of the context
    pooled_width: int = 2048
    clip_tokens: int = CLIP_TOKENS
    t5_tokens: int = T5_TOKENS

    def __call__(self, outputs: Mapping[str, TextEncoderOutput]) -> TextEncoderOutput:
        """Hidden states (..., clip tokens + T5 tokens, width) and pooled (..., pooled_width)."""
        first = cast(Array, next(iter(outputs.values())).hidden_states)
        batch, dtype = first.shape[:-2], first.dtype
        clips = [outputs.get(spec.component) for spec in (CLIP_L, CLIP_G)]
        clip = self._side_by_side([c and c.hidden_states for c in clips], self.width)
        pooled = self._side_by_side([c and c.pooled for c in clips], self.pooled_width)
        t5 = outputs[T5.component].hidden_states if T5.component in outputs else None
        if clip is None or pooled is None:
            clip = jnp.zeros((*batch, self.clip_tokens, self.width), dtype)
            pooled = jnp.zeros((*batch, self.pooled_width), dtype)
        if t5 is None:
            t5 = jnp.zeros((*batch, self.t5_tokens, self.width), dtype)
        return TextEncoderOutput(jnp.concatenate([clip, t5], axis=-2), pooled)

    def _side_by_side(
        self, pair: Sequence[Array | None], width: int
    ) -> Float[Array, "*n w"] | None:
        """Both CLIPs' arrays, padded with zeros to `width`; None if there are none."""
        given = [array for array in pair if array is not None]
        if not given:
            return None
        together = jnp.concatenate(given, axis=-1)
        # Of both kinds of output the first CLIP's is as wide as its pooled embedding.
        before = self.pooled_width - together.shape[-1] if pair[0] is None else 0
        sides = (before, width - before - together.shape[-1])
        return jnp.pad(together, [(0, 0)] * (together.ndim - 1) + [sides])


SD3 = Family(
    name="Stable Diffusion 3",
    network="transformer",
    network_class=SD3Transformer2DModel,
    adapter=SD3Adapter,
    latent_multiple=2,
    text_encoders=(CLIP_L, CLIP_G, T5),
    join=JoinCLIPAndT5(),
    pooled_argument="pooled_projections",
    defaults={"guidance_scale": 7.0, "steps": 28},
)
SD35 = dataclasses.replace(
    SD3, name="Stable Diffusion 3.5", defaults={"guidance_scale": 4.5, "steps": 28}
)
FAMILIES = (SD3, SD35)


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together."""
    del options
    transformer = required_component(components, SD3.network, SD3Transformer2DModel, source)
    config = cast(SD3Transformer2DModel, transformer).config
    codecs = AutoencoderKL, AutoencoderTiny
    vae = cast(AutoencoderKL, required_component(components, "vae", codecs, source))
    if config.channels != (vae.config.latent_channels,) * 2:
        raise InputError(
            f"{source}: transformer: got channels {config.channels}, "
            f"expected {vae.config.latent_channels} in and out, as the VAE has"
        )
    encoders = tuple(spec for spec in SD3.text_encoders if spec.component in components)
    _check_text_encoders(components, encoders, config, source)
    # Normed queries and keys are new in 3.5.
    family = SD3 if config.qk_norm is None else SD35
    clips = [cast(CLIPTextModel, components[each.component]) for each in encoders if each.pooled]
    tokens = max((clip.config.max_position_embeddings for clip in clips), default=CLIP_TOKENS)
    join = JoinCLIPAndT5(
        width=config.joint_attention_dim,
        pooled_width=config.pooled_projection_dim,
        clip_tokens=tokens,
    )
    return dataclasses.replace(
        family,
        latent_multiple=config.patch_size,
        latent_limit=config.patch_size * config.pos_embed_max_size,
        text_encoders=encoders,
        join=join,
    )


def _check_text_encoders(
    components: Mapping[str, nnx.Module],
    encoders: tuple[TextEncoder, ...],
    config: SD3Transformer2DConfig,
    source: str,
) -> None:
    """InputError unless there is one, and what they give fits the network."""
    if not encoders:
        names = ", ".join(spec.component for spec in SD3.text_encoders)
        raise InputError(f"{source}: text encoders: got none, expected some of {names}")
    for spec in encoders:
        encoder = required_component(components, spec.component, TextModel, source)
        width = cast(Any, encoder).config.hidden_size
        if not spec.pooled and width != config.joint_attention_dim:
            raise InputError(
                f"{source}: {spec.component}: got hidden states of width {width}, "
                f"expected {config.joint_attention_dim}, as the transformer has"
            )
    clips = [
        cast(CLIPTextModel, required_component(components, spec.component, CLIPTextModel, source))
        for spec in encoders
        if spec.pooled
    ]
    if any(clip.text_projection is None for clip in clips):
        raise InputError(
            f"{source}: text encoders: got a CLIP without text_projection, expected both with it"
        )
    states = sum(clip.config.hidden_size for clip in clips)
    pooled = sum(clip.config.projection_dim or 0 for clip in clips)
    if states > config.joint_attention_dim:
        raise InputError(
            f"{source}: text encoders: got hidden states of width {states} in CLIP, "
            f"expected at most {config.joint_attention_dim}, as the transformer has"
        )
    # One alone is placed by the width of the other's pooled embedding.
    fits = {0: True, 1: states == pooled < config.pooled_projection_dim}
    if not fits.get(len(clips), pooled == config.pooled_projection_dim):
        raise InputError(
            f"{source}: text encoders: got pooled embeddings of width {pooled} in CLIP, "
            f"expected {config.pooled_projection_dim}, as the transformer has"
        )
