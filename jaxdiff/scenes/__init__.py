"""Procedural scenes: a data set with captions, labels and a judge of its own."""
