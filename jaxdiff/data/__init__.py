"""Training data: procedurally drawn scenes, their captions and tokenizer, and grain pipelines."""
