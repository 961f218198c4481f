"""What files of the original layout store beside weights, against diffusers."""

import numpy as np
import pytest
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from jaxdiff.checkpoints.layout_dit import positions


@pytest.mark.parametrize(("width", "side"), [(1152, 16), (8, 3)])
def test_positions_of_dit(width, side):
    theirs = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt")
    np.testing.assert_allclose(positions(width, side)[0], np.asarray(theirs), atol=2e-6)
