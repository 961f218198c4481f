"""PixArt's diffusion transformer: a DiT with cross-attention to the hidden states of a text."""
