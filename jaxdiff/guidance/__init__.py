"""Guidance: how K predictions under different conditions become one, at every step of a sampler.

A rule says which streams it needs and how they combine; `guided` runs them in one network call and
wraps rule and network into the denoiser that a sampler calls. Wrappers change a rule in one
respect; steering adds the gradient of something that can be computed from the picture.
"""
