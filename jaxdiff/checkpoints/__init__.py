"""Weights in and out: safetensors, diffusers component and pipeline folders, training state."""
