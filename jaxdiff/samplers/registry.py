"""The samplers by name."""

import dataclasses

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.samplers.base import Sampler
from jaxdiff.samplers.ddim import DDIM
from jaxdiff.samplers.ddpm import DDPM
from jaxdiff.samplers.dpmpp_2m import DPMpp2M
from jaxdiff.samplers.dpmpp_2s import DPMpp2S
from jaxdiff.samplers.dpmpp_sde import DPMpp2MSDE, DPMpp3MSDE
from jaxdiff.samplers.euler import Euler, EulerAncestral
from jaxdiff.samplers.heun import Heun
from jaxdiff.samplers.lcm import LCM
from jaxdiff.samplers.pndm import PNDM
from jaxdiff.samplers.unipc import UniPC

SAMPLERS: dict[str, Sampler] = {
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
    "lcm": LCM(),
}


def get_sampler(name: str, eta: float | None = None) -> Sampler:
    """The sampler of that name, with a share `eta` of fresh noise where one is given (0 to 1).

    Raises InputError where it has none to choose.
    """
    rule = SAMPLERS[one_of("sampler", name, SAMPLERS)]
    if eta is None:
        return rule
    if not isinstance(rule, DDIM):
        raise InputError(f"eta: got {eta:g} with sampler {name!r}, expected sampler 'ddim'")
    return dataclasses.replace(rule, eta=eta)
