"""What an image costs: how often the network is evaluated for it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdiff.core.validate import in_range
from jaxdiff.guidance import nfe as guidance_nfe
from jaxdiff.pipeline.batches import ModelFacts, guidance_rule
from jaxdiff.pipeline.request import Request, Requests
from jaxdiff.samplers.base import get_sampler


def nfe(facts: ModelFacts, requests: Sequence[Request], index: int) -> int:
    """Network evaluations for image `index` of a call (NFE); see `guidance.nfe`.

    Images that may share its batch share its guidance streams. Raises InputError.
    """
    in_range("index", index, 0, len(requests) - 1)
    request = requests[index]
    group = Requests(each for each in requests if each.batch_key == request.batch_key)
    grid = jax.tree.map(jnp.asarray, facts.grid([request]))
    first, last = int(grid.first[0]), int(grid.last[0])
    rule = guidance_rule(group)
    per_step = get_sampler(request.sampler, request.eta).nfe(
        last - first,
        ends_clean=last == int(grid.num_steps[0]),
        restarts=guidance_nfe.phase_switches(rule, grid, first, last),
    )
    return guidance_nfe.nfe(rule, grid, first, per_step)
