"""The classifier's loss: closed forms at the start, a falling loss, frozen latents, accuracies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import abstract, initialise, param_dict, with_params
from jaxdiff.models.classifier import LatentClassifier, LatentClassifierConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.training.config import ClassifierObjective
from jaxdiff.training.objectives.classifier import accuracies, add_schedule_noise, classifier_task

MODEL = LatentClassifierConfig(
    sample_size=4,
    in_channels=2,
    block_out_channels=(8,),
    layers_per_block=1,
    attention_head_dim=4,
    norm_num_groups=2,
    group_names=("tone", "things"),
    group_labels=(("dark", "light", "grey"), ("left", "right")),
    group_exclusive=(True, False),
)
OBJECTIVE = ClassifierObjective(vae="", model=MODEL)
VAE = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(4, 4),
    norm_num_groups=2,
    latent_channels=2,
    mid_block_add_attention=False,
)
RNG = np.random.default_rng(0)


def batch(b=8):
    """Pictures that are dark, light or grey, with something bright on the left, right or both."""
    tone = RNG.integers(3, size=b)
    things = RNG.integers(2, size=(b, 2)).astype(bool)
    image = np.array([-0.8, 0.8, 0.0])[tone][:, None, None, None] * np.ones((1, 8, 8, 3))
    image[:, 2:6, :3] += 0.5 * things[:, 0, None, None, None] * np.array([1.0, -1, 0])
    image[:, 2:6, 5:] += 0.5 * things[:, 1, None, None, None] * np.array([-1.0, 1, 0])
    targets = np.concatenate([np.eye(3, dtype=bool)[tone], things], axis=1)
    values = {"image": image.astype(np.float32), "targets": targets, "known": np.ones((b, 5), bool)}
    return {name: jnp.asarray(array) for name, array in values.items()}


@pytest.fixture(scope="module")
def frozen():
    """An untrained VAE whose latents hardly vary by themselves and have about unit variance."""
    vae = param_dict(initialise(AutoencoderKL, VAE, seed=0))
    quiet = vae["quant_conv.bias"].at[2:].set(-20.0)
    mean, _ = with_params(abstract(AutoencoderKL, VAE), vae).encode(batch(64)["image"])
    kernel = vae["quant_conv.kernel"].at[..., :2].divide(VAE.scaling_factor * mean.std((0, 1, 2)))
    return vae | {"quant_conv.bias": quiet, "quant_conv.kernel": kernel.at[..., 2:].set(0.0)}


def learner(**changes):
    return classifier_task(dataclasses.replace(OBJECTIVE, **changes), abstract(AutoencoderKL, VAE))


def initial(learn):
    return {path: jnp.asarray(array) for path, array in learn.init(2)}


@pytest.mark.parametrize("draws", [1, 3])
def test_at_first_every_answer_costs_the_logarithm_of_the_choices(frozen, draws):
    learn = learner(noise_levels_per_image=draws)
    told = batch()
    value, parts = jax.jit(learn.loss)(initial(learn), frozen, told, jax.random.key(0))
    np.testing.assert_allclose(parts["nats_tone"], np.log(3), rtol=1e-6)
    np.testing.assert_allclose(parts["nats_things"], 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(value, np.log(3) + 2 * np.log(2), rtol=1e-6)
    # of what is not known nothing is learnt, so it costs nothing
    told["known"] = told["known"].at[::2, :3].set(False)
    _, parts = jax.jit(learn.loss)(initial(learn), frozen, told, jax.random.key(0))
    np.testing.assert_allclose(parts["nats_tone"], np.log(3) / 2, rtol=1e-6)


def test_the_loss_falls(frozen, standard_promotion):
    learn = learner(noise_levels_per_image=4, timestep_shift=0.2)
    params, told = initial(learn), batch(16)
    rule = optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        (value, _), grads = jax.value_and_grad(learn.loss, has_aux=True)(params, frozen, told, key)
        updates, state = rule.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, values = rule.init(params), []
    for i in range(150):
        params, state, value = step(params, state, jax.random.key(i))
        values.append(float(value))
    np.testing.assert_allclose(values[0], np.log(3) + 2 * np.log(2), rtol=1e-6)
    assert np.mean(values[-10:]) < 0.5 * values[0]


def test_the_vae_gets_no_gradient_and_all_others_do(frozen):
    learn = learner()
    params = {k: a + jnp.asarray(0.1 * RNG.normal(size=a.shape), a.dtype)
              for k, a in initial(learn).items()}  # fmt: skip
    told = batch()

    def loss(ours, theirs):
        return learn.loss(ours, theirs, told, jax.random.key(0))[0]

    ours, theirs = jax.jit(jax.grad(loss, (0, 1)))(params, frozen)
    # softmax does not see what all keys have in common
    still = [n for n, g in ours.items() if not jnp.any(jnp.abs(g) > 1e-9)]
    assert all(name.endswith("to_k.bias") for name in still), still
    assert not any(jnp.any(g) for g in theirs.values())


def test_noise_has_the_level_of_the_schedule():
    x0 = jnp.ones((2000, 2, 2, 1))
    for level in (0, 500, 999):
        x = add_schedule_noise(OBJECTIVE.schedule, x0, jnp.full(2000, level), jax.random.key(level))
        alpha, sigma = OBJECTIVE.schedule.alpha[level], OBJECTIVE.schedule.sigma[level]
        assert abs(float(x.mean()) - alpha) < 5 * sigma / np.sqrt(x.size)
        np.testing.assert_allclose(x.std(), sigma, rtol=0.05)


class Given(LatentClassifier):
    """Answers "light" at low noise and "dark" at high, and "left" if the latents are positive."""

    def __init__(self):
        nnx.Module.__init__(self)
        self.config = MODEL

    def __call__(self, sample, timesteps):
        late = (timesteps >= 500).astype(jnp.float32)
        left = sample.mean((1, 2, 3))
        zero = jnp.zeros_like(late)
        return jnp.stack([2 * late, zero + 1, zero, left, zero - 1], axis=-1)


def test_accuracies_are_shares_of_the_known_at_each_level():
    targets = jnp.asarray([[0, 1, 0, 1, 0], [1, 0, 0, 1, 0], [0, 1, 0, 1, 1], [0, 0, 1, 0, 0]])
    known = jnp.ones((4, 5), bool).at[3, :3].set(False)
    x0 = jnp.full((4, 4, 4, 2), 10.0)
    shares = accuracies(
        Given(), OBJECTIVE.schedule, x0, targets.astype(bool), known, [0, 600], jax.random.key(0)
    )
    # light in 2 of 3, dark in 1 of 3; only left in 2 of 4
    np.testing.assert_allclose(shares, [[2 / 3, 1 / 2], [1 / 3, 1 / 2]], rtol=1e-6)


def test_computing_in_bfloat16_needs_no_implicit_promotion(frozen):
    half = jnp.bfloat16
    learn = classifier_task(OBJECTIVE, abstract(AutoencoderKL, VAE, dtype=half), half)
    value, _ = jax.eval_shape(learn.loss, learn.shapes, frozen, batch(), jax.random.key(0))
    assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in learn.shapes.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("field", "value"),
    [("timestep_sampling", "normal"), ("timestep_shift", 0.0), ("noise_levels_per_image", 0)],
)
def test_impossible_choices_are_refused(field, value):
    with pytest.raises(InputError, match=rf"objective\.{field}: got"):
        dataclasses.replace(OBJECTIVE, **{field: value})
