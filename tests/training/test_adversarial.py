"""The VAE against a discriminator and through CLIP's eye: each loss and gradient by itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.build import abstract, initialise, param_dict, with_params
from jaxdiff.models.clip import CLIPVisionModel
from jaxdiff.models.clip_config import CLIPVisionConfig
from jaxdiff.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from jaxdiff.models.image_processor import CLIPImageProcessor
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig, sample_latents
from jaxdiff.training.config import EMAConfig, OptimiserConfig, VAEObjective
from jaxdiff.training.objectives.adversarial import hinge_loss
from jaxdiff.training.objectives.perceptual import PerceptualModel, hidden_state_distance
from jaxdiff.training.objectives.vae import Frozen, edge_loss, vae_task
from jaxdiff.training.optimiser import learning_rate, make_optimiser
from jaxdiff.training.step import initial_state, make_step, per_sample_normal

MODEL = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(4, 8),
    norm_num_groups=2,
    latent_channels=3,
    mid_block_add_attention=False,
)
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)
OBJECTIVE = VAEObjective(
    model=MODEL,
    l1_weight=0.5,
    l2_weight=2.0,
    edge_weight=0.25,
    kl_weight=0.01,
    perceptual_model="clip",
    perceptual_weight=0.3,
    adversarial_weight=0.7,
    adversarial_start=3,
    discriminator=PatchDiscriminatorConfig(width=4, layers=1, norm_num_groups=2),
)
VISION = CLIPVisionConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
EYE = PerceptualModel(
    abstract(CLIPVisionModel, VISION), CLIPImageProcessor(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
)
FROZEN = Frozen(perceptual=param_dict(initialise(CLIPVisionModel, VISION, seed=5)))
KEY = jax.random.key(1)
LAST = "vae.decoder.conv_out.kernel"


@pytest.fixture(scope="module")
def params():
    """Initial weights with noise, at which the players have opinions."""
    rng = np.random.default_rng(3)
    initial = vae_task(OBJECTIVE, perceptual_model=EYE).init(0)
    return {k: jnp.asarray(v + 0.1 * rng.normal(size=v.shape), jnp.float32) for k, v in initial}


def table(params, prefix):
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


def rebuilt(params):
    model = with_params(abstract(AutoencoderKL, MODEL), table(params, "vae."))
    mean, logvar = model.encode(IMAGES)
    return (
        model.decode(sample_latents(mean, logvar, per_sample_normal(KEY, mean.shape))),
        mean,
        logvar,
    )


def reconstruction(params):
    made, *_ = rebuilt(params)
    tower = with_params(EYE.module, FROZEN.perceptual).vision_model
    seen = hidden_state_distance(*(tower.states(x)[:-1] for x in (made, IMAGES)))
    error = made - IMAGES
    return (
        0.5 * jnp.mean(jnp.abs(error))
        + 2 * jnp.mean(error**2)
        + 0.25 * edge_loss(made, IMAGES)
        + 0.3 * seen
    )


def regular(params):
    _, mean, logvar = rebuilt(params)
    return 0.01 * 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)


def logits(critic, images):
    return with_params(abstract(PatchDiscriminator, OBJECTIVE.discriminator), critic)(images)


def fooling(params, critic):
    return -jnp.mean(logits(critic, rebuilt(params)[0]))


def mistakes(critic, made):
    real, false = logits(critic, IMAGES), logits(critic, made)
    return (jnp.mean(jnp.maximum(0, 1 - real)) + jnp.mean(jnp.maximum(0, 1 + false))) / 2


@functools.cache
def learner(adaptive=True, dtype=jnp.float32):
    objective = dataclasses.replace(OBJECTIVE, adversarial_adaptive=adaptive)
    return vae_task(objective, dtype, perceptual_model=EYE)


@pytest.fixture(scope="module")
def alone(params):
    """Each loss by itself with its gradient: three of the VAE's weights, one of the critic's."""

    @jax.jit
    def losses(vae, critic):
        ours = reconstruction, regular, lambda vae: fooling(vae, critic)
        made = rebuilt(vae)[0]
        return *(jax.value_and_grad(f)(vae) for f in ours), jax.value_and_grad(mistakes)(
            critic, made
        )

    vae = {path: array for path, array in params.items() if path.startswith("vae.")}
    return losses(vae, table(params, "discriminator."))


@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "fixed"])
def test_each_player_has_the_gradient_of_its_own_loss(params, alone, adaptive):
    (near, to_near), (plain, to_plain), (fool, to_fool), (wrong, theirs) = alone
    by_last = [jnp.linalg.norm(grad[LAST].ravel()) for grad in (to_near, to_fool)]
    amount = 0.7 * (by_last[0] / (by_last[1] + 1e-6) if adaptive else 1)
    expected = {path: to_near[path] + to_plain[path] + amount * to_fool[path] for path in to_near}
    expected |= {f"discriminator.{k}": v for k, v in theirs.items()}
    gradient = jax.jit(jax.value_and_grad(learner(adaptive).loss, has_aux=True))
    (value, parts), found = gradient(params, FROZEN, {"image": IMAGES}, KEY)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        size = float(jnp.abs(grad).max())
        np.testing.assert_allclose(found[name], grad, rtol=1e-4, atol=1e-5 * size, err_msg=name)
        assert size > 0, name
    np.testing.assert_allclose(parts["adversarial_weight"], amount, rtol=1e-5)
    np.testing.assert_allclose(value, near + plain + amount * fool + wrong, rtol=1e-5)


def test_before_its_start_the_discriminator_neither_learns_nor_counts(params):
    plain = {"adversarial_weight": 0.0, "adversarial_start": 0}
    alone = dataclasses.replace(OBJECTIVE, **plain, discriminator=PatchDiscriminatorConfig())
    gradient = jax.jit(jax.grad(vae_task(alone, perceptual_model=EYE).loss, has_aux=True))
    expected, _ = gradient(table(params, "vae."), FROZEN, {"image": IMAGES}, KEY)
    learn = learner()
    gradient = jax.jit(jax.grad(learn.loss, has_aux=True))
    for step, silent in ((2, True), (3, False)):
        frozen = learn.frozen_at_step(FROZEN, jnp.int32(step))
        found, _ = gradient(params, frozen, {"image": IMAGES}, KEY)
        assert (not any(jnp.any(g) for g in table(found, "discriminator.").values())) == silent
        same = [
            np.allclose(found[f"vae.{k}"], g, rtol=1e-4, atol=1e-5 * float(jnp.abs(g).max()))
            for k, g in expected.items()
        ]
        assert all(same) == silent


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("dtype", "parts"),
    [pytest.param(jnp.float32, 1, marks=pytest.mark.slow), (jnp.bfloat16, 2)],
    ids=str,
)
def test_training_begins_the_discriminator_at_its_step(dtype, parts):
    learn, config = learner(dtype=dtype), OptimiserConfig(learning_rate=1e-3, warmup_steps=1)
    transform = make_optimiser(config, 10)
    step = jax.jit(
        make_step(
            learn.loss,
            transform,
            learning_rate(config, 10),
            EMAConfig(decay=0.9),
            accumulation_steps=parts,
            frozen_at_step=learn.frozen_at_step,
        )
    )
    initial = {k: jnp.asarray(v) for k, v in learn.init(0)}
    state, changed = initial_state(initial, transform), []
    name = "discriminator.conv_in.bias"  # which no weight decay changes
    for _ in range(5):
        before = state.params[name]
        state, metrics = step(state, FROZEN, {"image": IMAGES}, KEY)
        changed.append(bool(jnp.any(state.params[name] != before)))
        assert all(np.isfinite(value) for value in metrics.values())
        assert float(metrics["nonfinite_steps"]) == 0
    assert changed == [False, False, False, True, True]
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {
        jnp.dtype(jnp.float32)
    }


def test_hinge_is_zero_beyond_the_margins_only():
    assert float(hinge_loss(jnp.asarray([1.0, 2.0]), jnp.asarray([-1.0, -5.0]))) == 0
    # (0.5 + 0) / 2 of the real ones and (1.5 + 3) / 2 of the others
    assert float(hinge_loss(jnp.asarray([0.5, 2.0]), jnp.asarray([0.5, 2.0]))) == (0.25 + 2.25) / 2


def test_distance_is_that_of_directions():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 3, 5, 4)).astype(np.float32) for _ in range(2))  # 2 layers
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    expected = np.mean(2 - 2 * cosines[:, :, 1:])  # without the class token
    states = [[jnp.asarray(layer) for layer in x] for x in (a, b)]
    np.testing.assert_allclose(hidden_state_distance(*states), expected, rtol=1e-5)
    longer = [3 * layer for layer in states[0]]
    assert float(hidden_state_distance(states[0], longer)) < 1e-10
    np.testing.assert_allclose(hidden_state_distance(longer, [-x for x in states[0]]), 4, rtol=1e-5)


def test_images_are_brought_to_the_size_of_the_eye():
    large = jnp.repeat(jnp.repeat(IMAGES, 2, axis=1), 2, axis=2)
    other = large[:, ::-1]
    found = EYE.loss(FROZEN.perceptual, large, other)
    resized = (jax.image.resize(x, (2, 8, 8, 3), "cubic") for x in (large, other))
    np.testing.assert_allclose(found, EYE.loss(FROZEN.perceptual, *resized), rtol=1e-6)
    assert float(found) > 1e-3
    assert float(EYE.loss(FROZEN.perceptual, large, large)) == 0
