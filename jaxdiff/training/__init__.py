"""Losses, optimiser, the pure step and the loop that drives it."""
