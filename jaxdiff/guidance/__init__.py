"""Guidance: how K predictions under different conditions become one, at every step of a sampler.

A rule says how many streams it needs and how they combine; `guided` runs them in one network call
and wraps rule and network into the denoiser that a sampler calls.
"""
