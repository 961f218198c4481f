"""The modules between CLIP's image embeddings and a decoder, against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from copier import agree, copy, image, randomise
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel as TheirProjection
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer as TheirNormalizer,
)

from jaxdiff.core.configs import from_mapping
from jaxdiff.models.unclip import (
    StableUnCLIPImageNormalizer,
    StableUnCLIPImageNormalizerConfig,
    UnCLIPTextProjConfig,
    UnCLIPTextProjModel,
)

FIELDS = {
    "clip_extra_context_tokens": 3,
    "clip_embeddings_dim": 10,
    "time_embed_dim": 8,
    "cross_attention_dim": 6,
}


def test_projection_of_both_streams():
    theirs = randomise(TheirProjection(**FIELDS))
    config = from_mapping(UnCLIPTextProjConfig, FIELDS, source="text_proj")
    ours = copy(theirs, UnCLIPTextProjModel, config)
    images, text, states = image((2, 10)), image((4, 10), seed=2), image((4, 5, 10), seed=3)
    # Theirs puts the learned embedding before the images'.
    context, time = theirs(
        image_embeddings=torch.from_numpy(images),
        prompt_embeds=torch.from_numpy(text),
        text_encoder_hidden_states=torch.from_numpy(states),
        do_classifier_free_guidance=True,
    )
    both = jnp.concatenate([ours.null_image_embeds(2), jnp.asarray(images)])
    found = jax.jit(lambda *inputs: ours(*inputs))(both, jnp.asarray(text), jnp.asarray(states))
    agree(found[0], context)
    agree(found[1], time)


def test_normaliser():
    theirs = randomise(TheirNormalizer(10))
    config = StableUnCLIPImageNormalizerConfig(embedding_dim=10)
    ours = copy(theirs, StableUnCLIPImageNormalizer, config)
    x = image((3, 10), seed=4)
    agree(ours.normalise(jnp.asarray(x)), theirs.scale(torch.from_numpy(x)))
    agree(ours.denormalise(jnp.asarray(x)), theirs.unscale(torch.from_numpy(x)))
    back = ours.denormalise(ours.normalise(jnp.asarray(x)))
    np.testing.assert_allclose(back, x, rtol=1e-4, atol=1e-5)
