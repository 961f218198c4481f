import jax
import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st

from jaxdiff.core.trees import cast_floating, flatten, parameter_count, unflatten

names = st.one_of(st.integers(0, 20), st.text("abc_", min_size=1, max_size=3))
trees = st.recursive(
    st.integers(), lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3), max_leaves=8
)


@given(st.dictionaries(names, trees, min_size=1, max_size=3))
def test_unflatten_inverts_flatten(tree):
    assert unflatten(flatten(tree)) == tree


def test_cast_changes_only_floating_leaves():
    tree = {"w": jnp.ones(2), "ids": jnp.ones(2, jnp.int32)}
    got = cast_floating(tree, jnp.bfloat16)
    assert (got["w"].dtype, got["ids"].dtype) == (jnp.bfloat16, jnp.int32)


def test_count_needs_only_shapes():
    assert parameter_count({"a": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": jnp.ones(4)}) == 10
