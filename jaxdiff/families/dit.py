"""DiT: a transformer on the latents of a VAE, conditioned on a class (2212.09748).

The same network trained as a flow is SiT (2401.08740). Here a flow is x = (1 - s) x0 + s eps, whose
velocity eps - x0 the network predicts at the time 1000 s; the code of SiT has data at time 1, noise
at 0 and the velocity x0 - eps, at times from 0 to 1. `checkpoints/layout_dit.py` reads its files.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from flax import nnx

from jaxdiff.families.base import Family
from jaxdiff.families.class_labels import ClassLabel, class_names
from jaxdiff.families.components import check_latent_channels, required_component
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny
from jaxdiff.models.dit.adapter import DiTAdapter
from jaxdiff.models.dit.module import DiTTransformer2DModel
from jaxdiff.models.vae import AutoencoderKL

PIPELINE_CLASSES = ("DiTPipeline",)
DIT = Family(
    name="DiT",
    network="transformer",
    network_class=DiTTransformer2DModel,
    adapter=DiTAdapter,
    text_encoders=(),
    extras=(ClassLabel(1000),),
    defaults={"guidance_scale": 4.0, "steps": 50},
)
FAMILIES = (DIT,)
FROM_SCRATCH = {"DiTPipeline": DIT}


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together.

    `options` are the plain values of model_index.json, with names of classes as `id2label`.
    """
    network = required_component(components, "transformer", DiTTransformer2DModel, source)
    vae = required_component(components, "vae", (AutoencoderKL, AutoencoderTiny), source)
    config = cast(DiTTransformer2DModel, network).config
    channels = cast(AutoencoderKL, vae).config.latent_channels
    check_latent_channels(config.in_channels, channels, name="transformer", source=source)
    names = class_names(options, config.num_embeds_ada_norm, source=source)
    return dataclasses.replace(
        DIT,
        latent_multiple=config.patch_size,
        extras=(ClassLabel(config.num_embeds_ada_norm, names),),
    )
