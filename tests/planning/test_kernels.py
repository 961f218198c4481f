"""Kernels' steps from the traced program, and their cycles."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxdiff.nn.attention_tpu import tpu
from jaxdiff.planning.hlo import Kernel
from jaxdiff.planning.kernel_bundles import read_bundles
from jaxdiff.planning.kernels import Grid, kernel_cost, kernel_grid, pallas_calls


def grids(program):
    return {key: kernel_grid(call) for key, call in pallas_calls(program).items()}


def test_steps_of_the_attention_kernels():
    x = jax.ShapeDtypeStruct((2, 1024, 3, 8), jnp.bfloat16)

    def total(x):
        return jnp.sum(tpu(x, x, x, causal=False).astype(jnp.float32))

    found = grids(jax.make_jaxpr(jax.grad(total))(x).jaxpr)
    by_name = {name: grid for (name, _), grid in found.items()}
    # pictures x heads x blocks of queries x blocks of keys
    assert by_name["attention_forward_1024x1024"].steps == 2 * 3 * 2 * 1
    assert by_name["attention_backward_1024x1024"].steps == 2 * 3 * 1 * 1
    assert all(results[-1][0] == 3 for _, results in found)
    # q, k, v, the output and a number in float32 for each query, all once
    tokens = 2 * 3 * 1024
    assert by_name["attention_forward_1024x1024"].bytes_moved == tokens * (4 * 8 * 2 + 4)
    # those, the output's gradient, and those of q, k and v
    assert by_name["attention_backward_1024x1024"].bytes_moved == tokens * (8 * 8 * 2 + 4)


def test_kernels_of_one_result_are_told_apart():
    """Attention over pixels and over words gives the same, in other numbers of steps."""
    x, words = (jax.ShapeDtypeStruct((2, n, 3, 8), jnp.bfloat16) for n in (8192, 77))
    both = jax.make_jaxpr(lambda x, w: (tpu(x, x, x, causal=False), tpu(x, w, w, causal=False)))
    steps = {name: grid.steps for (name, _), grid in grids(both(x, words).jaxpr).items()}
    assert steps["attention_forward_8192x8192"] == 2 * 3 * 16 * 2
    assert steps["attention_forward_8192x128"] == 2 * 3 * 4


def test_blocks_that_stay_are_fetched_once():
    """Of a sum of matrices, where a row of blocks of one meets all blocks of the other."""

    def kernel(a_ref, b_ref, out_ref):
        out_ref[...] = a_ref[...] + b_ref[...]

    def add(a, b):
        return pl.pallas_call(
            kernel,
            grid=(2, 3),
            in_specs=[
                pl.BlockSpec((8, 128), lambda i, j: (i, 0)),
                pl.BlockSpec((8, 128), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((16, 384), jnp.float32),
            name="add",
        )(a, b)

    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 128), (8, 384)))
    (found,) = grids(jax.make_jaxpr(add)(a, b).jaxpr).values()
    assert found.steps == 6
    assert found.bytes_moved == (2 + 6 + 6) * 8 * 128 * 4


def test_schedules_are_read_from_what_the_compiler_wrote(tmp_path):
    text = "Schedule analysis:\n\ttotal scheduled bundles:    1960\n\t1950.00 bundles: %splash.6 = "
    (tmp_path / "1-splash.6-71-schedule-analysis_final_bundles.txt").write_text(text + "f32[2]")
    (tmp_path / "1-splash.6-72-final_bundles.txt").write_text("")
    whole = text.replace("1960", "141") + "f32[2]"  # of the program around it
    (tmp_path / "1-TLP-00-schedule-analysis_final_bundles.txt").write_text(whole)
    assert read_bundles(tmp_path) == {"splash.6": 1960}


def test_cost():
    found = [
        Kernel("splash", ((1, 4),), "splash.6", 3),
        Kernel("splash", ((8,),), "splash.7", 1),
        Kernel("other", ((4,),), "other", 1),
    ]
    one = {("splash", ((4,),)): Grid(10, 8000.0)}
    price = functools.partial(kernel_cost, found, one, {("splash", ((4,),)): 100})
    assert price(1, 100.0) == (3000, ["other", "splash"])
    assert price(2, 100.0).cycles == 1500
    assert price(2, 4.0).cycles == 3 * 2000  # the memory is slower than the instructions
