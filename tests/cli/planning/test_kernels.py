"""Kernels' steps from the traced program, and their cycles."""

import functools

import jax
import jax.numpy as jnp

from jaxdiff.cli.planning.hlo import Kernel
from jaxdiff.cli.planning.kernels import cost, grids, schedules
from jaxdiff.nn.attention_kernels import tpu


def test_steps_of_the_attention_kernels():
    x = jax.ShapeDtypeStruct((2, 1024, 3, 8), jnp.bfloat16)

    def total(x):
        return jnp.sum(tpu(x, x, x, causal=False).astype(jnp.float32))

    found = grids(jax.make_jaxpr(jax.grad(total))(x).jaxpr)
    steps = {name: count for (name, _), count in found.items()}
    # pictures x heads x blocks of queries x blocks of keys
    assert steps["splash_mha_fwd_residuals"] == 2 * 3 * 2 * 1
    assert steps["splash_mha_dkv_no_residuals"] == 2 * 3 * 2 * 1
    assert all(results[-1][:2] == (2, 3) for _, results in found)


def test_schedules_are_read_from_what_the_compiler_wrote(tmp_path):
    text = "Schedule analysis:\n\ttotal scheduled bundles:    1960\n\t1950.00 bundles: %splash.6 = "
    (tmp_path / "1-splash.6-71-schedule-analysis_final_bundles.txt").write_text(text + "f32[2]")
    (tmp_path / "1-splash.6-72-final_bundles.txt").write_text("")
    assert schedules(tmp_path) == {"splash.6": 1960}


def test_cost():
    found = [
        Kernel("splash", ((1, 4),), "splash.6", 3),
        Kernel("splash", ((8,),), "splash.7", 1),
        Kernel("other", ((4,),), "other", 1),
    ]
    price = functools.partial(cost, found, {("splash", ((4,),)): 10}, {"splash.6": 100})
    assert price(1) == (3000, ["other", "splash"])
    assert price(2).cycles == 1500
