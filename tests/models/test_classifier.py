"""The classifier of noisy latents: its contract, and that noise level, place and latents matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.models.attributes import LabelGroup, LabelSet
from jaxdiff.models.build import abstract, initialise, param_dict, with_params
from jaxdiff.models.classifier import LatentClassifier, LatentClassifierConfig

CONFIG = LatentClassifierConfig(
    sample_size=4,
    in_channels=3,
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention_head_dim=4,
    norm_num_groups=4,
    group_names=("ground", "colours"),
    group_labels=(("white", "grey", "pink"), ("red", "blue")),
    group_exclusive=(True, False),
)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 4, 4, 3)), jnp.float32)
T = jnp.asarray([3, 700])


def call(params, x, t, **options):
    return with_params(abstract(LatentClassifier, CONFIG, **options), params)(x, t)


RUN = jax.jit(call)


@pytest.fixture(scope="module")
def params():
    """Weights with noise: layers that begin at zero would hide the others."""
    module = initialise(LatentClassifier, CONFIG, seed=0)
    return {
        path: array + jnp.asarray(0.2 * RNG.normal(size=array.shape), jnp.float32)
        for path, array in param_dict(module).items()
    }


def test_shape_and_dtype(params):
    logits = RUN(params, X, T)
    assert logits.shape == (2, CONFIG.attributes.width) == (2, 5)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(RUN(params, X, T.astype(jnp.float32)), logits)


@pytest.mark.slow
def test_compiled_is_eager(params):
    np.testing.assert_allclose(call(params, X, T), RUN(params, X, T), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_and_gives_float32(params):
    half = jax.jit(lambda *a: call(*a, dtype=jnp.bfloat16))(params, X, T)
    assert half.dtype == jnp.float32
    exact = RUN(params, X, T)
    assert 0 < float(jnp.abs(half - exact).max()) < 0.05 * float(jnp.abs(exact).max()) + 0.05


def test_an_untrained_classifier_finds_all_answers_equally_likely():
    logits = RUN(param_dict(initialise(LatentClassifier, CONFIG, seed=1)), X, T)
    everything = jnp.ones((2, 5), bool)
    target = jnp.asarray([[1, 0, 0, 1, 0]] * 2, bool)
    got = CONFIG.attributes.log_prob(logits, target, everything)
    np.testing.assert_allclose(got, -np.log(3) - 2 * np.log(2), rtol=1e-6)


def test_each_image_has_its_own_answer_at_its_own_time(params):
    logits = RUN(params, X, T)
    for i in range(2):
        alone = RUN(params, X[i : i + 1], T[i : i + 1])
        np.testing.assert_allclose(alone[0], logits[i], rtol=1e-4, atol=1e-5)
    other = RUN(params, X, T[::-1])
    assert float(jnp.abs(other - logits).min(-1).max()) > 1e-3


def test_places_matter(params):
    """Pooling keeps where things are: a mirrored scene is another one."""
    mirrored = RUN(params, X[:, :, ::-1], T)
    assert float(jnp.abs(mirrored - RUN(params, X, T)).max()) > 1e-3


def test_every_weight_and_the_latents_have_a_gradient(params):
    def value(params, x):
        known = jnp.ones((2, 5), bool)
        target = jnp.asarray([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]], bool)
        return CONFIG.attributes.log_prob(call(params, x, T), target, known).sum()

    of_params, of_x = jax.jit(jax.grad(value, (0, 1)))(params, X)
    # softmax does not see what all keys have in common
    still = {name for name, g in of_params.items() if float(jnp.abs(g).max()) < 1e-6}
    assert all(name.endswith("to_k.bias") for name in still), still
    assert np.isfinite(of_x).all()
    assert (np.abs(of_x).max((1, 2, 3)) > 1e-4).all()


def test_gradient_of_the_latents_is_the_slope(params):
    known = jnp.asarray([[1, 1, 1, 1, 0]] * 2, bool)
    target = jnp.asarray([[1, 0, 0, 1, 0]] * 2, bool)

    @jax.jit
    def value(x):
        return CONFIG.attributes.log_prob(call(params, x, T), target, known).sum()

    direction = jnp.asarray(RNG.normal(size=X.shape), jnp.float32)
    step = 1e-2
    slope = (value(X + step * direction) - value(X - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, jnp.vdot(jax.grad(value)(X), direction), rtol=1e-2)


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (2, 8, 8, 3), (2, 4, 8, 3)])
def test_latents_of_another_shape_are_refused(params, shape):
    with pytest.raises(InputError, match=r"sample: got shape .* expected \(any, 4, 4, 3\)"):
        call(params, jnp.zeros(shape), T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 0}, "in_channels: got 0"),
        ({"block_out_channels": ()}, "block_out_channels: got none"),
        ({"sample_size": 5}, "sample_size: got 5, expected a multiple of 2"),
        ({"sample_size": 0}, "sample_size: got 0"),
        ({"group_labels": (("a", "b"),)}, "group_labels: got 1, expected 2"),
        ({"group_exclusive": (True,) * 3}, "group_exclusive: got 3, expected 2"),
        ({"group_names": ("a", "a")}, "all different"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_head_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="attention heads"):
        abstract(LatentClassifier, dataclasses.replace(CONFIG, attention_head_dim=32))


def test_telling_replaces_the_groups_only():
    groups = LabelSet((LabelGroup(name="size", labels=("small", "large")),))
    told = CONFIG.with_labels(groups)
    assert told.attributes == groups
    assert dataclasses.replace(told, **{
        name: getattr(CONFIG, name) for name in ("group_names", "group_labels", "group_exclusive")
    }) == CONFIG  # fmt: skip
