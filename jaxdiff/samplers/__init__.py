"""Samplers: one loop, and step rules in the symbols of their papers.

In every step rule x is at level (alpha, sigma) and goes to (alpha', sigma'), `here` and `there` in
code; D and eps are the denoised image and the noise of the guided prediction at x;
h = lambda' - lambda is the step in half log-SNR, q = exp(-h). In these symbols the rules hold on
any path x = alpha x0 + sigma eps, and none divides by the alpha of pure noise or the sigma of a
clean image.
"""

from jaxdiff.core.aliases import former_names
from jaxdiff.samplers.base import (
    SAMPLERS,
    NoiseFn,
    Sampler,
    SamplingState,
    get_sampler,
    init_state,
    per_sample_keys,
    run_steps,
)
from jaxdiff.samplers.ddim import DDIM
from jaxdiff.samplers.ddpm import DDPM
from jaxdiff.samplers.deis import DEIS
from jaxdiff.samplers.dpmpp_2m import DPMpp2M
from jaxdiff.samplers.dpmpp_2s import DPMpp2S
from jaxdiff.samplers.dpmpp_sde import DPMpp2MSDE, DPMpp3MSDE
from jaxdiff.samplers.euler import Euler, EulerAncestral
from jaxdiff.samplers.flow_sde import FlowSDE
from jaxdiff.samplers.heun import Heun
from jaxdiff.samplers.inversion import invert
from jaxdiff.samplers.kdpm2 import KDPM2, KDPM2Ancestral
from jaxdiff.samplers.lcm import LCM
from jaxdiff.samplers.lms import LMS
from jaxdiff.samplers.pndm import PNDM
from jaxdiff.samplers.sampling import initial_noise, sample
from jaxdiff.samplers.tcd import TCD
from jaxdiff.samplers.unipc import UniPC

__all__ = [
    "SAMPLERS",
    "NoiseFn",
    "Sampler",
    "SamplingState",
    "get_sampler",
    "init_state",
    "initial_noise",
    "invert",
    "per_sample_keys",
    "run_steps",
    "sample",
]
__getattr__ = former_names(__name__)

SAMPLERS |= {
    "ddpm": DDPM(),
    "ddim": DDIM(),
    "pndm": PNDM(),
    "euler": Euler(),
    "euler-ancestral": EulerAncestral(),
    "heun": Heun(),
    "dpmpp-2s": DPMpp2S(),
    "dpmpp-2m": DPMpp2M(),
    "dpmpp-2m-sde": DPMpp2MSDE(),
    "dpmpp-3m-sde": DPMpp3MSDE(),
    "unipc": UniPC(),
    "lms": LMS(),
    "kdpm2": KDPM2(),
    "kdpm2-ancestral": KDPM2Ancestral(),
    "deis": DEIS(),
    "lcm": LCM(),
    "tcd": TCD(),
    "flow-sde": FlowSDE(),
}


def __dir__() -> list[str]:
    return __all__
