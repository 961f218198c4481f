"""Chroma: a transformer in the manner of FLUX.1, with T5 alone and classifier-free guidance.

Padding of the text is hidden from T5, and from the transformer but for one token of it.
"""

from collections.abc import Mapping
from typing import Any, cast

from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import required_component
from jaxdiff.families.flux import CODECS, check_states
from jaxdiff.models.chroma.adapter import ChromaAdapter
from jaxdiff.models.chroma.module import ChromaTransformer2DModel
from jaxdiff.models.flux.config import PATCH
from jaxdiff.models.vae import AutoencoderKL

PIPELINE_CLASSES = tuple(f"Chroma{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))
CHROMA = Family(
    name="Chroma",
    network="transformer",
    network_class=ChromaTransformer2DModel,
    adapter=ChromaAdapter,
    latent_multiple=PATCH,
    text_encoders=(
        TextEncoder(
            length=512,
            max_length=512,
            max_chunks=1,
            skips_layers=False,
            masks_padding=True,
            mask="context_mask",
        ),
    ),
    defaults={"guidance_scale": 5.0, "steps": 35},
)
FAMILIES = (CHROMA,)


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together."""
    del options
    network = required_component(components, CHROMA.network, ChromaTransformer2DModel, source)
    config = cast(ChromaTransformer2DModel, network).config
    vae = cast(AutoencoderKL, required_component(components, "vae", CODECS, source)).config
    check_states(components, CHROMA.text_encoders[0].component, config, source)
    latents = PATCH**2 * vae.latent_channels
    if (config.in_channels, config.token_channels) != (latents, latents):
        raise InputError(
            f"{source}: transformer: got {config.in_channels} channels in and "
            f"{config.token_channels} out, expected {latents}, as the VAE has"
        )
    return CHROMA
