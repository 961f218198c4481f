"""Text-to-image latent diffusion with classifier-free guidance in JAX and Flax."""

__version__ = "0.1.0"
