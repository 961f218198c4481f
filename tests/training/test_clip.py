"""The contrastive loss against its closed forms, and the retrieval measures."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.attributes import LabelGroup, LabelSet
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.training.config import CLIPObjective
from jaxdiff.training.objectives.clip import (
    AttributeHeads,
    clip_task,
    contrastive_loss,
    mask_duplicate_captions,
    retrieval,
    same_caption,
)

OBJECTIVE = CLIPObjective(
    text=CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
        eos_token_id=19,
    ),
    vision=CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    ),
    projection_dim=4,
)
LEARNER = clip_task(OBJECTIVE)
RNG = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RNG.uniform(-1, 1, (4, 8, 8, 3)), jnp.float32),
    "ids": jnp.asarray(
        [
            [18, 1, 2, 19, 19, 19],
            [18, 2, 1, 19, 19, 19],
            [18, 3, 19, 19, 19, 19],
            [18, 4, 5, 6, 7, 19],
        ]
    ),
}


def test_a_perfect_network_loses_nothing():
    for loss in contrastive_loss(100 * jnp.eye(5)):
        assert float(loss) < 1e-30


def test_knowing_nothing_costs_log_b():
    for loss in contrastive_loss(jnp.full((7, 7), 0.3)):
        np.testing.assert_allclose(loss, math.log(7), rtol=1e-6)


def test_the_two_directions_are_transposes():
    logits = jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)
    to_caption, to_image = contrastive_loss(logits)
    again_image, again_caption = contrastive_loss(logits.T)
    np.testing.assert_allclose([to_caption, to_image], [again_caption, again_image], rtol=1e-6)
    expected = -np.mean([logits[i, i] - np.log(np.exp(logits[i]).sum()) for i in range(6)])
    np.testing.assert_allclose(to_caption, expected, rtol=1e-5)


def test_another_image_of_the_same_caption_is_no_mistake():
    ids = jnp.asarray([[1, 2], [1, 2], [1, 3]])
    same = same_caption(ids)
    np.testing.assert_array_equal(same, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    scores = mask_duplicate_captions(jnp.zeros((3, 3)), same)
    to_caption, _ = contrastive_loss(scores)
    np.testing.assert_allclose(to_caption, (2 * math.log(2) + math.log(3)) / 3, rtol=1e-6)


def test_retrieval_among_all_and_within_blocks():
    # picture 1 prefers a caption of another block, picture 2 its neighbour's
    scores = jnp.asarray([[9, 1, 0, 0], [1, 8, 9, 0], [0, 0, 1, 2], [0, 0, 1, 5]], jnp.float32)
    found = retrieval(scores, 2)
    assert float(found["retrieval"]) == 0.5
    assert float(found["retrieval_hard"]) == 0.75
    assert float(retrieval(scores, 1)["retrieval_hard"]) == 1


def test_scale_begins_as_configured_and_ends_at_100():
    params = {path: jnp.asarray(array) for path, array in LEARNER.init(0)}
    np.testing.assert_allclose(jnp.exp(params["logit_scale"]), 1 / 0.07, rtol=1e-5)
    limited = LEARNER.project_params(params | {"logit_scale": jnp.float32(7)})
    np.testing.assert_allclose(jnp.exp(limited["logit_scale"]), 100, rtol=1e-5)
    assert LEARNER.project_params(params)["logit_scale"] == params["logit_scale"]


def test_every_weight_learns():
    params = {path: jnp.asarray(array) for path, array in LEARNER.init(0)}
    value_and_grad = jax.jit(jax.value_and_grad(LEARNER.loss, has_aux=True))
    (value, parts), grads = value_and_grad(params, {}, BATCH, jax.random.key(1))
    np.testing.assert_allclose(
        value, (parts["image_to_text_loss"] + parts["text_to_image_loss"]) / 2, rtol=1e-6
    )
    # softmax does not see what all keys have in common
    still = [name for name, g in grads.items() if jnp.max(jnp.abs(g)) < 1e-9]
    assert all(name.endswith("k_proj.bias") for name in still)


def test_computing_in_bfloat16_needs_no_implicit_promotion():
    half = clip_task(OBJECTIVE, jnp.bfloat16)
    value, _ = jax.eval_shape(half.loss, half.shapes, {}, BATCH, jax.random.key(0))
    assert value.dtype == jnp.float32


ATTRIBUTES = LabelSet(
    (
        LabelGroup(name="ground", labels=("white", "grey", "pink")),
        LabelGroup(name="first", labels=("red", "blue")),
    )
)
HEADS = AttributeHeads(ATTRIBUTES, (("ground",), ("first",)))
LABELS = {
    "targets": jnp.asarray([[1, 0, 0, 1, 0]] * 4, bool),
    "known": jnp.ones((4, 5), bool),
    "text_targets": jnp.asarray([[1, 0, 0, 1, 0]] * 4, bool),
    "text_known": jnp.asarray([[1, 1, 1, 0, 0]] * 3 + [[1] * 5], bool),
}


def test_heads_that_know_nothing_cost_the_logarithms_of_their_choices():
    learner = clip_task(dataclasses.replace(OBJECTIVE, attribute_weight=0.5), heads=HEADS)
    params = {path: jnp.asarray(array) for path, array in learner.init(0)}
    value, parts = jax.jit(learner.loss)(params, {}, BATCH | LABELS, jax.random.key(0))
    # the image knows both groups; end of text and slots ask for what captions say: 4 and 1 of 4
    nats = math.log(3) + math.log(2) + 2 * (math.log(3) + math.log(2) / 4)
    np.testing.assert_allclose(parts["attribute_loss"], nats, rtol=1e-6)
    contrast = (parts["image_to_text_loss"] + parts["text_to_image_loss"]) / 2
    np.testing.assert_allclose(value, contrast + 0.5 * nats, rtol=1e-6)


def test_each_slot_is_asked_for_its_own_groups_alone():
    learner = clip_task(dataclasses.replace(OBJECTIVE, attribute_weight=0.5), heads=HEADS)
    params = {path: jnp.asarray(array) for path, array in learner.init(0)}
    gradient = jax.jit(jax.grad(learner.loss, has_aux=True))
    grads, _ = gradient(params, {}, BATCH | LABELS, jax.random.key(0))
    ground, first = np.abs(grads["heads.slots.kernel"]).max(1)
    assert ground[:3].min() > 0
    assert ground[3:].max() == 0
    assert first[:3].max() == 0
    assert first[3:].min() > 0


def test_heads_compute_in_float32_beside_towers_in_bfloat16():
    objective = dataclasses.replace(OBJECTIVE, attribute_weight=0.5)
    half = clip_task(objective, jnp.bfloat16, HEADS)
    value, _ = jax.eval_shape(half.loss, half.shapes, {}, BATCH | LABELS, jax.random.key(0))
    assert value.dtype == jnp.float32


@pytest.mark.parametrize("scale", [0.5, 1000.0])
def test_impossible_scales_are_refused(scale):
    with pytest.raises(ValueError, match=r"objective\.logit_scale"):
        CLIPObjective(logit_scale=scale)
