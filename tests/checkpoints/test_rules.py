"""The rule table: each rule both ways."""

import numpy as np
import pytest

from jaxdiff.checkpoints.key_mapping import (
    path_to_torch_key,
    to_jax,
    to_torch,
    torch_key_to_path,
    torch_shape,
)
from jaxdiff.core.errors import InputError


@pytest.mark.parametrize(
    ("key", "shape", "path"),
    [
        ("down_blocks.0.resnets.1.norm1.weight", (3,), "down_blocks.0.resnets.1.norm1.scale"),
        ("down_blocks.0.resnets.1.norm1.bias", (3,), "down_blocks.0.resnets.1.norm1.bias"),
        ("mid_block.attentions.0.to_q.weight", (3, 5), "mid_block.attentions.0.to_q.kernel"),
        ("conv_in.weight", (7, 3, 2, 5), "conv_in.kernel"),
        ("embeddings.token_embedding.weight", (9, 2), "embeddings.token_embedding.embedding"),
        (
            "vision_model.embeddings.class_embedding",
            (4,),
            "vision_model.embeddings.class_embedding",
        ),
        ("logit_scale", (), "logit_scale"),
    ],
)
def test_both_ways(key, shape, path):
    assert torch_key_to_path(key, len(shape)) == path
    assert path_to_torch_key(path) == key
    stored = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    ours = to_jax(stored, path)
    np.testing.assert_array_equal(to_torch(ours, path), stored)
    assert torch_shape(ours.shape, path) == shape


def test_layouts():
    linear, conv = np.zeros((3, 5)), np.zeros((7, 3, 2, 5))
    assert to_jax(linear, "a.kernel").shape == (5, 3), "(out, in) becomes (in, out)"
    assert to_jax(conv, "a.kernel").shape == (2, 5, 3, 7), "OIHW becomes HWIO"
    assert to_jax(linear, "a.embedding").shape == (3, 5), "tables stay as they are"


def test_kernels_of_other_ranks_are_refused():
    with pytest.raises(InputError, match="got 3 dimensions"):
        to_jax(np.zeros((1, 2, 3)), "conv.kernel")
