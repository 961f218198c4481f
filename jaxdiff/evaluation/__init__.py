"""Measuring generated pictures: what they show, against what the prompt asked for."""
