"""Text-to-image latent diffusion with classifier-free guidance in JAX and Flax."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Pipeline", "load"]

if TYPE_CHECKING:
    from jaxdiff.pipeline.load import load
    from jaxdiff.pipeline.pipeline import Pipeline


def __getattr__(name: str) -> Any:
    # On first use, so that a command's --help does not wait for jax.
    if name == "load":
        from jaxdiff.pipeline.load import load

        return load
    if name == "Pipeline":
        from jaxdiff.pipeline.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'jaxdiff' has no attribute {name!r}")
