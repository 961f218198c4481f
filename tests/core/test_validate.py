import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import check_shape, in_range, non_negative, one_of, positive


@pytest.mark.parametrize("value", [0, -1, 0.0, float("nan"), float("inf")])
def test_positive_refuses(value):
    with pytest.raises(InputError, match=r"^steps: got .*, expected a number above 0$"):
        positive("steps", value)


@pytest.mark.parametrize("value", [-1, -1e-9, float("nan"), float("inf")])
def test_not_negative_refuses(value):
    with pytest.raises(InputError, match=r"^decay: got .*, expected a number of at least 0$"):
        non_negative("decay", value)


def test_good_values_come_back():
    image = np.zeros((2, 8, 8, 3))
    assert positive("steps", 3) == 3
    assert non_negative("decay", 0.0) == 0.0
    assert in_range("eta", 0.5, 0, 1) == 0.5
    assert one_of("dtype", "float32", ["float32", "bfloat16"]) == "float32"
    assert check_shape("image", image, (None, 8, 8, 3)) is image


def test_in_range_names_the_range():
    with pytest.raises(InputError, match=r"^eta: got 2, expected a number from 0 to 1$"):
        in_range("eta", 2, 0, 1)


def test_one_of_proposes_the_nearest():
    with pytest.raises(InputError, match=r"sampler: got 'dpmp-2m', .* \(did you mean 'dpmpp-2m'"):
        one_of("sampler", "dpmp-2m", ["ddim", "dpmpp-2m"])


@pytest.mark.parametrize("got", [(2, 8, 8), (2, 8, 9, 3)])
def test_shape_tells_got_and_expected(got):
    with pytest.raises(InputError, match=r"expected \(any, 8, 8, 3\)"):
        check_shape("image", np.zeros(got), (None, 8, 8, 3))


def test_what_users_say_in_several_lines_is_said_in_one():
    assert (
        str(InputError("prompt: got a\r\n  b\u2028c, expected d"))
        == "prompt: got a b c, expected d"
    )
