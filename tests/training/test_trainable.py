"""What is trained of a model and what is not: partitions, low-rank layers, loss weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny_training import OBJECTIVE, frozen, networks

from jaxdiff.core.errors import InputError
from jaxdiff.families.stable_diffusion import SD
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.clip import TOKEN_EMBEDDING
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.lora import LoRAConv, LoRALinear
from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    Full,
    LoRA,
    TextualInversion,
    TrainConfig,
    resume_identity,
)
from jaxdiff.training.objectives.diffusion import diffusion_task, train_denoiser
from jaxdiff.training.objectives.trainable import (
    train_denoiser_and_text_encoders,
    train_lora,
    train_textual_inversion,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def tuned_by(kind, given):
    """The smallest networks tuned in one of the ways, which begin with the tables `given`."""
    if kind == "unet":
        return train_denoiser(SD, networks(), lambda: given)
    if kind == "encoders":
        return train_denoiser_and_text_encoders(SD, networks(), lambda: given)
    if kind == "lora":
        return train_lora(SD, networks(), LoRA(rank=2, text_target_modules=("q_proj", "fc1")))
    return train_textual_inversion(
        SD, networks(), 2, {"text_encoder": 20}, lambda: {"text_encoder": np.ones((2, 8))}
    )


@pytest.mark.parametrize("kind", ["unet", "encoders", "lora", "word"])
def test_one_batch_is_learnt_and_nothing_else_changes(kind):
    """Of the weights of the whole only those that are parameters are others afterwards."""
    still = frozen()
    unet = param_dict(tiny.random_component(UNet2DConditionModel, OBJECTIVE.model, seed=2).module)
    given = {**still.weights, "unet": unet}
    tuned = tuned_by(kind, given)
    still = still._replace(weights={name: given[name] for name in tuned.frozen})
    learn = diffusion_task(dataclasses.replace(OBJECTIVE, caption_dropout=0.0), tuned)
    rng = np.random.default_rng(0)
    ids = jnp.asarray([[18, 20, 21, 19, 19], [18, 21, 3, 20, 19]])
    image = jnp.asarray(np.tanh(rng.normal(size=(2, 8, 8, 3))), jnp.float32)
    descent = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        value, slope = jax.value_and_grad(
            lambda p: learn.loss(p, still, {"image": image, "ids": ids}, jax.random.key(1))[0]
        )(params)
        updates, state = descent.update(slope, state)
        return optax.apply_updates(params, updates), state, value

    initial = {path: jnp.asarray(array) for path, array in learn.init(0)}
    assert {path: array.shape for path, array in initial.items()} == {
        path: leaf.shape for path, leaf in learn.shapes.items()
    }
    params, state, losses = initial, descent.init(initial), []
    for _ in range(12):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] * (0.999 if kind == "word" else 0.95)

    before, after = (tuned.merge(table, still.weights) for table in (initial, params))
    changed = {
        f"{name}.{path}"
        for name, table in before.items()
        for path, array in table.items()
        if not np.array_equal(array, after[name][path])
    }
    names = {
        "unet": {f"unet.{path}" for path in initial},
        "word": {"text_encoder." + TOKEN_EMBEDDING},
    }
    assert changed == names.get(kind, set(initial))
    if kind == "word":
        rows = after["text_encoder"][TOKEN_EMBEDDING]
        np.testing.assert_array_equal(rows[:20], given["text_encoder"][TOKEN_EMBEDDING])
        np.testing.assert_array_equal(rows[20:], params["text_encoder.vectors"])
        assert np.all(np.any(rows[20:] != 1, axis=1))


@pytest.mark.parametrize("conv", [False, True])
def test_low_rank_layers_add_the_product_of_their_factors(conv):
    layers, rng = LayerFactory(rngs=None), np.random.default_rng(0)
    layer = layers.conv(3, 6, 3, stride=2) if conv else layers.linear(3, 6)
    changed = (LoRAConv if conv else LoRALinear)(layer, 2, 0.5)
    table = {
        path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in param_dict(changed).items()
    }
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 3)), jnp.float32)
    down, up = table["lora_A.kernel"], table["lora_B.kernel"]
    delta = 0.5 * down.reshape(-1, 2) @ up.reshape(2, 6)
    merged = {"kernel": table["kernel"] + delta.reshape(table["kernel"].shape)}
    expected = with_params(layer, {**merged, "bias": table["bias"]})
    network = with_params(changed, table)
    np.testing.assert_allclose(network(x), expected(x), rtol=1e-4, atol=1e-5)
    if not conv:
        halves = jnp.concatenate(network.split_outputs(x), axis=-1)
        np.testing.assert_allclose(halves, expected(x), rtol=1e-4, atol=1e-5)


def test_weights_of_images_weigh_their_losses():
    params = {path: jnp.asarray(array) for path, array in train_denoiser(SD, networks()).init(0)}
    learn = diffusion_task(OBJECTIVE, train_denoiser(SD, networks()))
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.uniform(-1, 1, (4, 8, 8, 3)), jnp.float32),
        "ids": jnp.full((4, 5), 3),
    }
    loss = jax.jit(learn.loss)
    key, still = jax.random.key(0), frozen()
    each = [loss(params, still, batch | {"weight": jnp.eye(4)[i]}, key)[0] for i in range(4)]
    weight = jnp.asarray([2, 0.5, 2, 0.5])
    together, _ = loss(params, still, batch | {"weight": weight}, key)
    np.testing.assert_allclose(together, np.dot(weight, each), rtol=1e-5)
    plain, _ = loss(params, still, batch, key)
    np.testing.assert_allclose(plain, sum(each), rtol=1e-5)


PIPELINE = DiffusionObjective(pipeline="a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": None}, r"objective\.vae: got none, expected it or a pipeline"),
        ({"vae": "b"}, r"objective\.vae: got one besides objective\.pipeline"),
        ({"weights": "b"}, r"objective\.weights: got one beside"),
        ({"prediction_type": "epsilon"}, r"objective\.prediction_type: got one beside"),
        ({"caption_dropout_per_encoder": (0.1, 2.0)}, r"objective\.caption_dropout: got 2\.0"),
        (
            {"prior_loss_weight": 2.0},
            r"objective\.prior_loss_weight: got 2\.0 without objective\.prior_data",
        ),
        (
            {"pipeline": None, "vae": "b", "text_encoder": "c", "trainable": LoRA()},
            r"objective\.trainable: got LoRA for a new network",
        ),
    ],
    ids=str,
)
def test_impossible_tunings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PIPELINE, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(rank=0), r"objective\.trainable\.rank: got 0"),
        (lambda: LoRA(alpha=0.0), r"objective\.trainable\.alpha: got 0"),
        (lambda: LoRA(target_modules=()), r"objective\.trainable\.target_modules: got none"),
        (
            lambda: TextualInversion(placeholder_token="a b", initializer_token="c"),
            r"objective\.trainable\.placeholder_token: got 'a b'",
        ),
        (
            lambda: TextualInversion(placeholder_token="x", initializer_token="c", num_vectors=0),
            r"trainable\.num_vectors: got 0",
        ),
    ],
)
def test_impossible_kinds_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_identity_is_what_is_trained_and_leaves_to_the_pipeline_what_it_says():
    config = TrainConfig(objective=PIPELINE, steps=1, batch_size=8, data=DataConfig())
    now = resume_identity(config)
    assert now["objective.trainable"] == "Full"
    assert not any(name.startswith("objective.model") for name in now)
    for train in (Full(text_encoders=True), LoRA(), LoRA(rank=2)):
        other = dataclasses.replace(PIPELINE, trainable=train)
        assert resume_identity(dataclasses.replace(config, objective=other)) != now
