"""CLIP's rules that a comparison with one implementation cannot show on its own."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import initialise
from jaxdiff.models.clip import CLIPModel, CLIPTextModel, CLIPVisionModel
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 50, "num_hidden_layers": 2, "max_position_embeddings": 8}
VISION = {**SIZES, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}


def text(**fields):
    return initialise(CLIPTextModel, CLIPTextConfig(**TEXT | fields), seed=0)


def test_text_is_causal():
    model = text()
    ids = jnp.array([[1, 2, 3, 4, 5, 6]])
    changed = model(ids.at[0, 4].set(40))
    np.testing.assert_allclose(model(ids)[:, :4], changed[:, :4], rtol=1e-5, atol=1e-6)
    assert (jnp.abs(model(ids)[:, 4:] - changed[:, 4:]) > 1e-3).any()


@pytest.mark.parametrize(
    ("eos", "ids", "position"),
    [
        (2, [9, 49, 3, 2, 2], 1),  # the legacy rule: the largest id
        (7, [9, 49, 7, 7, 7], 2),  # the first end, also where padding is the same token
        (7, [49, 3, 4, 5, 7], 4),
    ],
)
def test_pooled_is_taken_at_the_end_of_the_text(eos, ids, position):
    features = text(eos_token_id=eos).features(jnp.array([ids]))
    np.testing.assert_array_equal(features.pooled, features.last[:, position])


def test_embeddings_are_unit_vectors():
    model = initialise(CLIPModel, CLIPTextConfig(**TEXT), CLIPVisionConfig(**VISION), 5, seed=0)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3), np.float32))
    for embeds in (model.text_embeds(jnp.array([[1, 2], [3, 4]])), model.image_embeds(images)):
        assert embeds.shape == (2, 5)
        np.testing.assert_allclose(jnp.square(embeds).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(model.logit_scale[...]), 1 / 0.07, rtol=1e-3)


def test_refusals():
    with pytest.raises(InputError, match="ids: got 9 tokens, expected at most 8"):
        text()(jnp.ones((1, 9), jnp.int32))
    vision = initialise(CLIPVisionModel, CLIPVisionConfig(**VISION), seed=0)
    with pytest.raises(InputError, match=r"images: got shape \(1, 9, 8, 3\)"):
        vision(jnp.ones((1, 9, 8, 3)))
    with pytest.raises(InputError, match="projection_dim: got null"):
        initialise(CLIPTextModel, CLIPTextConfig(**TEXT, projection_dim=None), True, seed=0)
    with pytest.raises(InputError, match="num_attention_heads: got 3, expected a divisor"):
        CLIPTextConfig(**TEXT | {"num_attention_heads": 3})
    with pytest.raises(InputError, match="image_size: got 2"):
        CLIPVisionConfig(**VISION | {"image_size": 2})
