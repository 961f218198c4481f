"""Samplers: one loop, and step rules in the symbols of their papers.

In every step rule x is at level (alpha, sigma) and goes to (alpha', sigma'), `here` and `there` in
code; D and eps are the denoised image and the noise of the guided prediction at x;
h = lambda' - lambda is the step in half log-SNR, q = exp(-h). In these symbols the rules hold on
any path x = alpha x0 + sigma eps, and none divides by the alpha of pure noise or the sigma of a
clean image.
"""

from jaxdiff.core.aliases import former_names
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState
from jaxdiff.samplers.loop import init_state, run_steps, sample
from jaxdiff.samplers.noise import initial_noise, per_sample_keys
from jaxdiff.samplers.registry import SAMPLERS, get_sampler

__all__ = [
    "SAMPLERS",
    "NoiseFn",
    "Sampler",
    "SamplingState",
    "get_sampler",
    "init_state",
    "initial_noise",
    "per_sample_keys",
    "run_steps",
    "sample",
]
__getattr__ = former_names(__name__)
