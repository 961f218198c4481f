"""Weights between a PyTorch module and ours, failing when either side has one left over."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from jaxdiff.checkpoints.key_mapping import path_to_torch_key, to_jax, to_torch, torch_key_to_path
from jaxdiff.models.build import abstract, param_dict, with_params


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter random values that `seed` alone decides; signals keep their scale.

    Scalars and the weights of norms vary around their initial values, which are constants; those of
    biases are random, so they would make two networks of one seed differ.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                constant = parameter.ndim == 0 or name.endswith("weight")
                parameter.copy_((parameter if constant else 0) + 0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.eval()


def to_ours(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """PyTorch tensors by key as arrays in our layout by path."""
    arrays = {}
    for key, tensor in tensors.items():
        path = torch_key_to_path(key, tensor.ndim)
        assert path_to_torch_key(path) == key
        array = tensor.detach().numpy()
        arrays[path] = to_jax(array, path)
        assert np.array_equal(to_torch(arrays[path], path), array)
    return arrays


def prefixed(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Put `prefix` before every key: transformers writes bare names for models without a head."""
    return {prefix + key: tensor for key, tensor in tensors.items()}


def copy(module: torch.nn.Module, cls: type, *configs: Any, prefix: str = "", **options: Any):
    """Our module `cls(*configs)` with the weights of the PyTorch `module`."""
    arrays = to_ours(prefixed(module.state_dict(), prefix))
    return with_params(
        abstract(cls, *configs, **options), {path: jnp.asarray(a) for path, a in arrays.items()}
    )


def gradients(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The PyTorch module's gradients in our layout by path; buffers, never trained, have zeros."""
    found = {key: torch.zeros_like(tensor) for key, tensor in module.state_dict().items()}
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{key} has no gradient"
        found[key] = parameter.grad
    return to_ours(found)


def compare_gradients(ours: Any, module: torch.nn.Module, limit: float = 2e-5) -> float:
    """Largest relative error of any parameter's gradient, in the Euclidean norm.

    A parameter without influence (the bias of attention keys) has only rounding for a gradient: the
    norm counts as at least 1e-3 of that of all gradients. Fails above `limit`.
    """
    theirs, ours = gradients(module), param_dict(ours)
    assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
    norms = {path: np.linalg.norm(gradient) for path, gradient in theirs.items()}
    floor = 1e-3 * np.linalg.norm(list(norms.values()))
    worst = max(
        (float(np.linalg.norm(np.asarray(ours[path]) - gradient) / max(norms[path], floor)), path)
        for path, gradient in theirs.items()
    )
    assert worst[0] < limit, worst
    return worst[0]


def relative_error(ours: Any, theirs: torch.Tensor) -> float:
    """max |ours - theirs| / max |theirs|, where theirs may be NCHW and ours NHWC."""
    reference = theirs.detach().numpy()
    if reference.ndim == 4:
        reference = reference.transpose(0, 2, 3, 1)
    ours = np.asarray(ours, np.float32)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def agree(ours: Any, theirs: torch.Tensor, limit: float = 2e-5) -> float:
    """Fail unless the relative error is below `limit`; returns it."""
    error = relative_error(ours, theirs)
    assert error < limit, error
    return error


def image(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """Standard normal float32 NHWC values."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    """NHWC values as a PyTorch tensor."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
