"""The samplers by name."""

import dataclasses
from collections.abc import Sequence

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


def nfe_per_step(
    name: str, steps: int, *, ends_clean: bool = True, restarts: Sequence[int] = ()
) -> list[int]:
    """The denoiser calls of each of `steps` steps.

    `ends_clean`: the last one ends at sigma 0; `restarts`: the steps that begin another phase.
    """
    counts = [1] * steps
    if isinstance(SAMPLERS[name], Heun):
        counts = [2] * (steps - ends_clean) + [1] * ends_clean
    elif isinstance(SAMPLERS[name], PNDM):
        counts = [2 if i in {0, *restarts} else 1 for i in range(steps)]
    return counts
