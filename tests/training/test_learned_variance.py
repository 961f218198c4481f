"""Trainings of a DiT that learns the variance of its steps: what the bound adds to the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_training

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import FlowSchedule, VPSchedule
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.families.dit import DIT
from jaxdiff.models.build import abstract
from jaxdiff.models.dit.config import DiTTransformer2DConfig
from jaxdiff.models.dit.module import DiTTransformer2DModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.training.config import DiffusionObjective
from jaxdiff.training.objectives.diffusion import Frozen, diffusion_task, train_denoiser

CONFIG = DiTTransformer2DConfig(
    sample_size=4,
    in_channels=2,
    out_channels=4,
    num_layers=1,
    attention_head_dim=4,
    num_attention_heads=2,
    num_embeds_ada_norm=3,
)
OBJECTIVE = DiffusionObjective(
    vae="", model=CONFIG, schedule=VPSchedule(), prediction_type="epsilon", caption_dropout=0.0
)
RNG = np.random.default_rng(0)
BATCH = {
    "mean": jnp.asarray(RNG.normal(size=(3, 4, 4, 2)), jnp.float32),
    "logvar": jnp.full((3, 4, 4, 2), -30.0),
    "class_labels": jnp.arange(3),
}
FROZEN = Frozen(weights={}, null={})


def task(dtype=jnp.float32, **changes):
    objective = dataclasses.replace(OBJECTIVE, **changes)
    networks = {
        "transformer": abstract(DiTTransformer2DModel, objective.model, dtype=dtype),
        "vae": abstract(AutoencoderKL, tiny_training.VAE),
    }
    return diffusion_task(objective, train_denoiser(DIT, networks))


def loss_and_gradient(learner, params):
    function = jax.jit(jax.value_and_grad(learner.loss, has_aux=True))
    (value, metrics), gradient = function(params, FROZEN, BATCH, jax.random.key(0))
    return float(value), metrics, gradient


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_bound_trains_the_variance_alone(kind):
    """It adds its weight times itself to the loss, and no gradient of the prediction's weights."""
    hybrid, simple = (task(prediction_type=kind, vlb_weight=w) for w in (0.5, 0.0))
    params = {
        path: jnp.asarray(array + 0.1 * RNG.normal(size=array.shape).astype(np.float32))
        for path, array in hybrid.init(0)
    }
    value, metrics, gradient = loss_and_gradient(hybrid, params)
    plain, others, alone = loss_and_gradient(simple, params)
    assert "vlb" not in others
    np.testing.assert_allclose(value - plain, 0.5 * float(metrics["vlb"]), rtol=1e-4)
    # Of each pixel of the patches the channels of the prediction, then those of the variance.
    last, plain_last = (
        np.asarray(each["proj_out_2.kernel"]).reshape(8, 2, 2, 4) for each in (gradient, alone)
    )
    np.testing.assert_allclose(last[..., :2], plain_last[..., :2], rtol=1e-4, atol=1e-6)
    assert not plain_last[..., 2:].any()
    assert last[..., 2:].all()


def test_a_flow_has_no_variance_to_learn():
    flow = {"schedule": FlowSchedule(), "prediction_type": "flow_prediction"}
    shapes = jax.eval_shape(task(**flow).loss, task().shapes, FROZEN, BATCH, jax.random.key(0))
    assert set(shapes[1]) == {"latent_std"}


def test_the_bound_is_in_float32():
    learner = task(jnp.bfloat16)
    value, metrics = jax.eval_shape(learner.loss, learner.shapes, FROZEN, BATCH, jax.random.key(0))
    assert value.dtype == metrics["vlb"].dtype == jnp.float32


def test_a_weight_without_a_variance_is_refused(tmp_path):
    objective = DiffusionObjective(pipeline=str(tiny.write_tiny(tmp_path / "sd")), vlb_weight=0.01)
    with pytest.raises(InputError, match=r"objective\.vlb_weight: got 0\.01, expected it left out"):
        load_base_model(objective)
    assert load_base_model(dataclasses.replace(objective, vlb_weight=0.001)).objective.vlb_weight
    with pytest.raises(InputError, match=r"objective\.vlb_weight: got -1"):
        dataclasses.replace(objective, vlb_weight=-1.0)
