"""Training data: procedural scenes, stored pictures and latents, a tokenizer, grain pipelines."""
