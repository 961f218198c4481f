"""The text encoder of latent diffusion's text-to-image model."""
