"""Training data: stored pictures and latents, a tokenizer, grain pipelines."""
