"""8-bit floats as PyTorch writes and reads them, all 256 of each format."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jaxdiff.checkpoints.safetensors import read_tensor
from jaxdiff.checkpoints.weights import read_weights


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_same_values(tmp_path, dtype):
    stored = torch.arange(256, dtype=torch.uint8).view(dtype)
    scale = torch.tensor(0.37)
    tensors = {
        "a.weight": stored.reshape(16, 16),
        "b.weight": stored.clone(),
        "b.scale_weight": scale,
    }
    save_file(tensors, tmp_path / "x.safetensors")
    entries = read_weights(tmp_path / "x.safetensors")
    wanted = {"a.weight": tensors["a.weight"].float(), "b.weight": stored.float() * scale}
    for name, values in wanted.items():
        np.testing.assert_array_equal(read_tensor(entries[name]), values.numpy())
