"""What an image costs: how often the network is evaluated for it."""

import jax
import jax.numpy as jnp

from jaxdiff.guidance import nfe as guidance_nfe
from jaxdiff.pipeline.batches import ModelFacts, guidance_rule
from jaxdiff.pipeline.request import Requests
from jaxdiff.samplers.base import get_sampler


def nfe(facts: ModelFacts, requests: Requests, index: int) -> int:
    """Network evaluations for image `index` of a call (NFE); see `guidance.nfe`."""
    request = requests[index]
    grid = jax.tree.map(jnp.asarray, facts.grid([request]))
    first, last = int(grid.first[0]), int(grid.last[0])
    rule = guidance_rule(requests)
    per_step = get_sampler(request.sampler, request.eta).nfe(
        last - first,
        ends_clean=last == int(grid.num_steps[0]),
        restarts=guidance_nfe.phase_switches(rule, grid, first, last),
    )
    return guidance_nfe.nfe(rule, grid, first, per_step)
