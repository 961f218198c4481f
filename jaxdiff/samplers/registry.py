"""The samplers by name."""

import dataclasses

from jaxdiff.core.aliases import rename_sampler
from jaxdiff.core.errors import InputError
from jaxdiff.core.notation import split_options, with_options
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


def get_sampler(name: str, eta: float | None = None, *, kind: str = "sampler") -> Sampler:
    """The sampler that a name such as "ddim:eta=0.5" or "heun:s_churn=40" describes.

    `eta` is that option of a sampler which has it, 0 to 1. Errors, InputError, begin with `kind`.
    """
    key, options = split_options(kind, rename_sampler(name))
    sampler = SAMPLERS[one_of(kind, key, SAMPLERS)]
    if eta is not None:
        fitting = [k for k, each in SAMPLERS.items() if "eta" in _options(each)]
        if key not in fitting:
            raise InputError(
                f"eta: got {eta:g} with sampler {key!r}, "
                f"expected sampler {' or '.join(map(repr, fitting))}"
            )
        if "eta" in options:
            raise InputError(f"eta: got {eta:g} with sampler {name!r}, expected it once")
        options["eta"] = str(float(eta))
    return with_options(kind, key, sampler, options, internal=_INTERNAL)


def registered_name(text: str) -> str:
    """The name in SAMPLERS of the sampler that `text` describes; raises InputError."""
    return one_of("sampler", split_options("sampler", text)[0], SAMPLERS)


def _options(sampler: Sampler) -> set[str]:
    return {field.name for field in dataclasses.fields(sampler)} - {*_INTERNAL}


_INTERNAL = ("schedule",)  # set from the model, not by users
