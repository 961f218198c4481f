"""The prior's boundary: what its config and its inputs may be, and what its tokens see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import abstract, initialise, param_dict, with_params
from jaxdiff.models.prior.config import PriorTransformerConfig
from jaxdiff.models.prior.module import PriorTransformer
from jaxdiff.training.optimiser import weight_decay_mask

CONFIG = PriorTransformerConfig(
    num_attention_heads=2, attention_head_dim=6, num_layers=2, embedding_dim=10, num_embeddings=5
)


def arguments(**changes):
    made = {
        "sample": jax.ShapeDtypeStruct((2, 10), jnp.float32),
        "timesteps": jax.ShapeDtypeStruct((2,), jnp.float32),
        "context": jax.ShapeDtypeStruct((2, 5, 10), jnp.float32),
        "text_embeds": jax.ShapeDtypeStruct((2, 10), jnp.float32),
        "context_mask": jax.ShapeDtypeStruct((2, 5), bool),
    }
    return made | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": (2, 9)}, r"sample: got shape \(2, 9\), expected \(any, 10\)"),
        ({"text_embeds": (2, 9)}, r"text_embeds: got shape \(2, 9\), expected \(2, 10\)"),
        (
            {"context": (2, 4, 10), "context_mask": (2, 4)},
            r"context: got shape \(2, 4, 10\), expected \(2, 5, 10\)",
        ),
    ],
)
def test_inputs_must_be_those_of_the_config(changes, message):
    made = arguments()
    made |= {n: jax.ShapeDtypeStruct(shape, made[n].dtype) for n, shape in changes.items()}
    prior = abstract(PriorTransformer, CONFIG)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda p, x: with_params(prior, p)(**x), param_dict(prior), made)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"added_emb_type": None}, "added_emb_type: got None"),
        ({"encoder_hid_proj_type": None}, "encoder_hid_proj_type: got None"),
        ({"additional_embeddings": 0}, "additional_embeddings: got 0"),
        ({"norm_in_type": "layer"}, "norm_in_type: got 'layer'"),
        ({"embedding_dim": 0}, "embedding_dim: got 0"),
    ],
)
def test_config_refuses_what_is_not_there(fields, message):
    with pytest.raises(InputError, match=message):
        PriorTransformerConfig(**fields)


def test_padding_is_not_seen():
    prior = initialise(PriorTransformer, CONFIG, seed=0)
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((12, 10))
    prior.proj_to_clip_embeddings.kernel[...] = jnp.asarray(kernel, jnp.float32)
    mask = jnp.arange(5)[None] < jnp.array([[3], [5]])
    x, pooled = (jnp.asarray(rng.standard_normal((2, 10)), jnp.float32) for _ in range(2))
    states, others = (jnp.asarray(rng.standard_normal((2, 5, 10)), jnp.float32) for _ in range(2))
    call = jax.jit(
        lambda c: prior(x, jnp.array([1.0, 9.0]), c, text_embeds=pooled, context_mask=mask)
    )
    changed = call(jnp.where(mask[..., None], states, others))
    np.testing.assert_array_equal(changed, call(states))
    assert np.abs(call(others) - changed).max() > 1e-3


def test_statistics_do_not_decay():
    decays = weight_decay_mask(param_dict(initialise(PriorTransformer, CONFIG, seed=0)))
    assert decays["proj_in.kernel"]
    assert not decays["clip_mean"]
    assert not decays["clip_std"]
