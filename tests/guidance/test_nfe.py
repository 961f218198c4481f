"""Counted evaluations, against what the network is really asked."""

import jax
import jax.numpy as jnp
import pytest

from jaxdiff.checkpoints.schedulers import vp_schedule
from jaxdiff.checkpoints.timestep_grids import make_grid
from jaxdiff.guidance.base import GuidanceScales, parse
from jaxdiff.guidance.denoiser import ConditionedNetwork, guided_denoiser
from jaxdiff.guidance.nfe import nfe, phase_switches
from jaxdiff.samplers.base import SAMPLERS, get_sampler, per_sample_keys
from jaxdiff.samplers.sampling import sample

SCHEDULE = vp_schedule({"beta_schedule": "scaled_linear"})
STEPS = 10


def grid_of(sampler="ddim"):
    return make_grid(SCHEDULE, sampler, STEPS, prediction_type="epsilon", spacing="trailing")


def count(rule, grid, sampler="ddim", first=0, last=STEPS):
    """What we say that the steps from `first` to `last` cost."""
    switches = phase_switches(rule, grid, first, last)
    each = get_sampler(sampler).nfe(last - first, ends_clean=last == STEPS, restarts=switches)
    return nfe(rule, grid, first, each)


def asked(rule, grid, sampler="ddim"):
    """How many rows a network is given for one image in a run of the loop."""
    rows = []

    def network(weights, x, t, told, **more):
        jax.debug.callback(lambda n: rows.append(int(n)), jnp.int32(len(x)))
        return jnp.ones_like(x)

    streams = [sum(s.network == name for s in rule.streams) for name in ("main", "guidance_model")]
    told, given_guide = (jnp.zeros((1, n, 1)) for n in streams)
    guide = ConditionedNetwork(network, (), given_guide, "epsilon") if streams[1] else None
    dials = GuidanceScales(jnp.full(1, 3.0))
    denoise = guided_denoiser(
        network, (), told, dials, rule=rule, prediction_type="epsilon", guidance_model=guide
    )
    x = jnp.ones((1, 2, 2, 1))
    keys = per_sample_keys((0,))
    choices = {
        "sampler": get_sampler(sampler).for_schedule(SCHEDULE),
        "guidance_state": rule.init_state(x),
        "guidance_phase": rule.phase,
    }
    with jax.disable_jit():  # quicker than to compile what runs once
        sample(denoise, x, grid, keys, **choices)
    jax.effects_barrier()
    return sum(rows)


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "cfg",
        "negative",
        "autoguidance",
        "pag",
        "apg:momentum=-0.5+rescale",
        "cfg+interval:lo=0.3,hi=5",
        "pag+interval:lo=1",
        "cfg+interval:hi=0",
        "cfg-zero-star",
        "cfg-zero-star:zero_steps=3+rescale+interval:lo=1,hi=5",
    ],
)
def test_the_count_is_what_the_network_is_asked(text):
    rule, grid = parse(text), grid_of()
    assert count(rule, grid) == asked(rule, grid)


def test_adaptive_guidance_is_counted_as_if_it_never_rested():
    """Here all streams agree at once: two evaluations in the first step, one in the others."""
    rule, grid = parse("cfg+adaptive"), grid_of()
    assert asked(rule, grid) == STEPS + 1
    assert count(rule, grid) == 2 * STEPS


def test_rules_of_several_prompts_that_rest_ask_all_streams():
    rule = parse("cfg+interval:hi=0").for_prompts(3)
    assert count(rule, grid_of()) == 4 * STEPS


@pytest.mark.parametrize("sampler", [*SAMPLERS, "pndm:skip_prk_steps=false"])
def test_samplers_ask_as_often_as_they_say(sampler):
    """With an interval too: a step that asks twice is inside or outside as a whole, and one that
    begins another phase is a first one."""
    for text in ("cfg", "cfg+interval:lo=1", "cfg+interval:lo=0.3,hi=5", "cfg-zero-star"):
        rule, grid = parse(text), grid_of(sampler.partition(":")[0])
        assert count(rule, grid, sampler) == asked(rule, grid, sampler)


def test_parts_of_the_way():
    grid, rule = grid_of(), parse("cfg+interval:lo=1")
    assert count(parse("cfg"), grid, first=3, last=7) == 8
    assert count(parse("cfg"), grid, "heun", first=3, last=7) == 16
    whole = count(rule, grid)
    assert whole == count(rule, grid, last=4) + count(rule, grid, first=4)
    assert STEPS < whole < 2 * STEPS


def test_pndm_with_one_step_asks_once():
    """As the last step of any grid, be it the first that is run."""
    grid = make_grid(SCHEDULE, "pndm", 1, prediction_type="epsilon")
    for name in ("pndm", "pndm:skip_prk_steps=false"):
        assert get_sampler(name).nfe(1) == [1]
        assert asked(parse("none"), grid, name) == 1
    assert get_sampler("pndm:skip_prk_steps=false").nfe(5) == [4, 4, 4, 1, 1]
