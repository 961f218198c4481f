"""Training data: stored images and latents, a tokenizer, grain pipelines."""
