"""CLIP's text and vision towers against transformers, in the styles of the models that use them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from copier import agree, copy, image, nchw, randomise

from jaxdiff.core.configs import from_mapping
from jaxdiff.models.clip import CLIPModel, CLIPTextModel, CLIPVisionModel
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig

SIZES = {"vocab_size": 99, "hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3}
TEXT = {
    "L": {"hidden_act": "quick_gelu", "num_hidden_layers": 3, "eos_token_id": 2},
    "H": {"hidden_act": "gelu", "num_hidden_layers": 4, "eos_token_id": 2, "projection_dim": 16},
    "bigG": {"hidden_act": "gelu", "num_hidden_layers": 2, "projection_dim": 32},
    "first-eos": {"num_hidden_layers": 1, "eos_token_id": 98, "max_position_embeddings": 10},
}
# The end of the text is 98 and the padding is either 98 again or a smaller id.
IDS = np.array(
    [
        [97, 5, 6, 7, 98, 98, 98, 98, 98, 98],
        [97, 8, 98, 1, 1, 1, 1, 1, 1, 1],
        [97, 4, 9, 3, 2, 7, 8, 6, 5, 98],
    ]
)


def text_fields(name):
    return {**SIZES, "eos_token_id": 98, **TEXT[name]}


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", TEXT)
def test_text(name, projection):
    fields = text_fields(name)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    theirs = randomise(kind(transformers.CLIPTextConfig(**fields)))
    ours = copy(
        theirs,
        CLIPTextModel,
        from_mapping(CLIPTextConfig, fields, source=name),
        projection,
        prefix="" if projection else "text_model.",
    )
    out = theirs(torch.from_numpy(IDS), output_hidden_states=True)
    ids = jnp.asarray(IDS, jnp.int32)
    features = jax.jit(lambda ids: ours.features(ids))(ids)
    agree(features.last, out.last_hidden_state)
    agree(features.penultimate, out.hidden_states[-2])
    agree(features.pooled, out.text_embeds if projection else out.pooler_output)
    agree(ours(ids), out.last_hidden_state)
    norm = theirs.text_model.final_layer_norm if projection else theirs.final_layer_norm
    for skip in range(1, fields["num_hidden_layers"]):
        features = ours.features(ids, skip)
        agree(features.last, norm(out.hidden_states[-1 - skip]))
        agree(features.penultimate, out.hidden_states[-2 - skip])
        agree(features.pooled, out.text_embeds if projection else out.pooler_output)


VISION = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3, "patch_size": 4}


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_vision(act, projection):
    fields = {**VISION, "hidden_act": act, "num_hidden_layers": 3, "image_size": 14}
    kind = (
        transformers.CLIPVisionModelWithProjection if projection else transformers.CLIPVisionModel
    )
    theirs = randomise(kind(transformers.CLIPVisionConfig(**fields)))
    config = from_mapping(CLIPVisionConfig, fields, source=act)
    prefix = "" if projection else "vision_model."
    ours = copy(theirs, CLIPVisionModel, config, projection, prefix=prefix)
    x = image((2, 14, 14, 3))
    out = theirs(nchw(x))
    features = jax.jit(lambda x: ours(x))(jnp.asarray(x))
    agree(features.last, out.last_hidden_state)
    agree(features.pooled, out.image_embeds if projection else out.pooler_output)


def test_both_towers():
    text = {**text_fields("first-eos"), "projection_dim": 40}
    vision = {**VISION, "num_hidden_layers": 2, "image_size": 8}
    theirs = randomise(
        transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=40)
        )
    )
    ours = copy(
        theirs,
        CLIPModel,
        from_mapping(CLIPTextConfig, text, source="text"),
        from_mapping(CLIPVisionConfig, vision, source="vision"),
        40,
    )
    x = image((3, 8, 8, 3))
    out = theirs(input_ids=torch.from_numpy(IDS), pixel_values=nchw(x))
    texts = ours.text_embeds(jnp.asarray(IDS, jnp.int32))
    images = ours.image_embeds(jnp.asarray(x))
    agree(texts, out.text_embeds)
    agree(images, out.image_embeds)
    agree(jnp.exp(ours.logit_scale[...]) * texts @ images.T, out.logits_per_text)
