"""Log-probabilities of attributes against closed forms, and what counts as a right answer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.models.attributes import LabelGroup, LabelSet

ATTRIBUTES = LabelSet(
    (
        LabelGroup(name="ground", labels=("white", "grey", "pink")),
        LabelGroup(name="colours", labels=("red", "blue"), exclusive=False),
    )
)
LOGITS = [0.5, -1.0, 2.0, 0.3, -0.7]


def masks(*rows):
    """`rows` of ones and zeros as a mask."""
    return jnp.asarray(rows, bool)


def logits(*rows, dtype=jnp.float32):
    return jnp.asarray(rows, dtype)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_where_the_groups_lie():
    assert ATTRIBUTES.width == 5
    assert ATTRIBUTES.slices == {"ground": slice(0, 3), "colours": slice(3, 5)}
    assert ATTRIBUTES.index("colours", "blue") == 4
    with pytest.raises(InputError, match="group: got 'colors'"):
        ATTRIBUTES.index("colors", "blue")
    with pytest.raises(InputError, match="colours: got 'white'"):
        ATTRIBUTES.index("colours", "white")


def test_log_prob_by_hand():
    total = sum(math.exp(x) for x in LOGITS[:3])
    # grey; red and no blue
    full = math.log(math.exp(-1.0) / total) + math.log(sigmoid(0.3)) + math.log(1 - sigmoid(-0.7))
    # not white: grey or pink; blue, and nothing about red
    part = math.log((math.exp(-1.0) + math.exp(2.0)) / total) + math.log(sigmoid(-0.7))
    # one of two that are right
    either = math.log((math.exp(0.5) + math.exp(-1.0)) / total)
    got = ATTRIBUTES.log_prob(
        logits(LOGITS, LOGITS, LOGITS, LOGITS),
        masks([0, 1, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 0, 1, 1], [1, 0, 0, 1, 0]),
        masks([1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]),
    )
    np.testing.assert_allclose(got, [full, part, either, 0], rtol=1e-6)
    assert float(got[3]) == 0


def test_what_is_not_known_has_exactly_no_gradient():
    def value(x):
        known = masks([0, 0, 0, 1, 0])
        return ATTRIBUTES.log_prob(x, masks([1, 0, 0, 1, 1]), known).sum()

    gradient = jax.grad(value)(logits(LOGITS))[0]
    np.testing.assert_array_equal(gradient[jnp.asarray([0, 1, 2, 4])], 0)
    np.testing.assert_allclose(gradient[3], 1 - sigmoid(0.3), rtol=1e-6)


def test_gradient_of_the_known_is_target_minus_probability():
    everything = masks([1] * 5)
    target = masks([0, 1, 0, 1, 0])
    gradient = jax.grad(lambda x: ATTRIBUTES.log_prob(x, target, everything).sum())(logits(LOGITS))
    softmax = np.exp(LOGITS[:3]) / np.exp(LOGITS[:3]).sum()
    expected = np.array([0, 1, 0, 1, 0]) - [*softmax, sigmoid(0.3), sigmoid(-0.7)]
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-5)


def test_probabilities_of_all_answers_sum_to_one():
    answers = [
        [int(i == ground) for i in range(3)] + [red, blue]
        for ground in range(3)
        for red in (0, 1)
        for blue in (0, 1)
    ]
    n = len(answers)
    got = ATTRIBUTES.log_prob(logits(*[LOGITS] * n), masks(*answers), jnp.ones((n, 5), bool))
    np.testing.assert_allclose(np.exp(got).sum(), 1, rtol=1e-6)


def test_extreme_logits_stay_finite_in_half_precision():
    wild = logits([6e4, -6e4, 0, -6e4, 6e4], dtype=jnp.float16)
    got = ATTRIBUTES.log_probs(wild, masks([0, 1, 0, 1, 0]), masks([1] * 5))
    assert got.dtype == jnp.float32
    worst = np.float32(np.float16(6e4))
    np.testing.assert_allclose(got, [[-2 * worst, -2 * worst]], rtol=1e-6)


def test_right_answers():
    right, asked = ATTRIBUTES.correct(
        logits(LOGITS, LOGITS, LOGITS, LOGITS),
        # pink; white; not white; nothing asked
        masks([0, 0, 1, 1, 0], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]),
        masks([1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]),
    )
    np.testing.assert_array_equal(asked, [[1, 1], [1, 1], [1, 1], [0, 0]])
    np.testing.assert_array_equal(right[:3], [[1, 1], [0, 0], [1, 1]])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), "groups: got names"),
        ((LabelGroup(name="a", labels=("x", "y")),) * 2, "all different"),
        ((LabelGroup(name="a", labels=("x",)),), "labels of a: got .* at least 2"),
        ((LabelGroup(name="a", labels=(), exclusive=False),), "labels of a: got .* at least 1"),
        ((LabelGroup(name="a", labels=("x", "x")),), "labels of a"),
    ],
)
def test_groups_without_sense_are_refused(groups, message):
    with pytest.raises(InputError, match=message):
        LabelSet(groups)
