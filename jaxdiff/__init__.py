"""Text-to-image latent diffusion with classifier-free guidance in JAX and Flax.

    pipe = jaxdiff.load()                       # or a diffusers folder, a single file, a Hub name
    out = pipe("a small red circle", seed=7)
    out.images[0].save("circle.png")

`train(config, workdir)` trains a model. `samplers`, `guidance`, `schedules` and `training` are
usable as libraries of their own.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Cascade",
    "InputError",
    "Output",
    "Pipeline",
    "TrainResult",
    "guidance",
    "load",
    "samplers",
    "schedules",
    "train",
    "training",
]

if TYPE_CHECKING:
    from jaxdiff import guidance, samplers, training
    from jaxdiff.core.errors import InputError
    from jaxdiff.diffusion import schedules
    from jaxdiff.experiments.train import TrainResult, train
    from jaxdiff.pipeline.cascade import Cascade
    from jaxdiff.pipeline.load import load
    from jaxdiff.pipeline.pipeline import Output, Pipeline

_MODULES = {
    "guidance": "jaxdiff.guidance",
    "samplers": "jaxdiff.samplers",
    "schedules": "jaxdiff.diffusion.schedules",
    "training": "jaxdiff.training",
}
_HOMES = {
    "Cascade": "jaxdiff.pipeline.cascade",
    "InputError": "jaxdiff.core.errors",
    "Output": "jaxdiff.pipeline.pipeline",
    "Pipeline": "jaxdiff.pipeline.pipeline",
    "TrainResult": "jaxdiff.experiments.train",
    "load": "jaxdiff.pipeline.load",
    "train": "jaxdiff.experiments.train",
}


def __getattr__(name: str) -> Any:
    # On first use, so that a command's --help does not wait for jax.
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jaxdiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
