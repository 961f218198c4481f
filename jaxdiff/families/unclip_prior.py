"""The prior of unCLIP (2204.06125, section 2.2): from a text to CLIP's embedding of an image."""

from collections.abc import Mapping
from typing import cast

from flax import nnx

from jaxdiff.checkpoints.pipelines import IMAGE_ENCODER
from jaxdiff.core.errors import InputError
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import required_component
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.latent_codec import ImageEmbeddings
from jaxdiff.models.prior.adapter import PriorAdapter
from jaxdiff.models.prior.module import PriorTransformer


def _embeddings(prior: PriorTransformer) -> ImageEmbeddings:
    return ImageEmbeddings(prior.clip_mean, prior.clip_std)


def unclip_prior(name: str, *, prefix: str = "") -> Family:
    """The family `name` of a prior, whose text encoder and tokenizer have names with a `prefix`."""
    return Family(
        name=name,
        network="prior",
        network_class=PriorTransformer,
        adapter=PriorAdapter,
        latent_codec=None,
        embeddings=_embeddings,
        image_encoder=IMAGE_ENCODER,
        text_encoders=(
            TextEncoder(
                component=f"{prefix}text_encoder",
                tokenizer=f"{prefix}tokenizer",
                pooled=True,
                mask="context_mask",
                max_chunks=1,
                skips_layers=False,
            ),
        ),
        defaults={"guidance_scale": 4.0, "steps": 25},
    )


def check_prior(family: Family, components: Mapping[str, nnx.Module], source: str) -> None:
    """InputError, from `source`, unless the `components` of a prior of `family` fit together."""
    name = family.text_encoders[0].component
    prior = required_component(components, family.network, PriorTransformer, source)
    encoder = required_component(components, name, CLIPTextModel, source)
    config, text = cast(PriorTransformer, prior).config, cast(CLIPTextModel, encoder).config
    wanted = {
        "hidden_size": config.embedding_dim,
        "projection_dim": config.pooled_width,
        "max_position_embeddings": config.num_embeddings,
    }
    for field, expected in wanted.items():
        if (got := getattr(text, field)) != expected:
            raise InputError(
                f"{source}: {name}: got {field} {got}, expected {expected}, as the prior has"
            )
