"""Building: shapes without memory, weights by path, and errors that name what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import abstract, initial_weights, initialise, param_dict, with_params
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.clip_config import CLIPTextConfig

CONFIG = CLIPTextConfig(
    vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
)
PATH = "text_model.encoder.layers.1.self_attn.q_proj.kernel"


def test_abstract_holds_shapes():
    shapes = param_dict(abstract(CLIPTextModel, CONFIG, param_dtype=jnp.bfloat16))
    assert {type(leaf) for leaf in shapes.values()} == {jax.ShapeDtypeStruct}
    assert shapes[PATH] == jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)


def test_every_way_to_build_gives_the_same_paths():
    eager = CLIPTextModel(CONFIG, rngs=nnx.Rngs(0))
    for module in (abstract(CLIPTextModel, CONFIG), initialise(CLIPTextModel, CONFIG, seed=0)):
        assert {p: (w.shape, w.dtype) for p, w in param_dict(module).items()} == {
            p: (w.shape, w.dtype) for p, w in param_dict(eager).items()
        }


def test_initial_weights_depend_on_seed_and_path_only():
    small = dict(initial_weights(abstract(CLIPTextModel, CONFIG), seed=3))
    large = dict(initial_weights(abstract(CLIPTextModel, CONFIG, with_projection=True), seed=3))
    other = dict(initial_weights(abstract(CLIPTextModel, CONFIG), seed=4))
    assert large.keys() - small.keys() == {"text_projection.kernel"}
    for path, array in small.items():
        np.testing.assert_array_equal(array, large[path])
    assert (small[PATH] != other[PATH]).any()
    assert (small[PATH] != small[PATH.replace("q_proj", "k_proj")]).any()


def test_initial_weights_have_the_described_spread():
    drawn = dict(initial_weights(abstract(CLIPTextModel, CLIPTextConfig()), seed=0))
    std = 512**-0.5 * 24**-0.5  # as transformers' _init_weights for attention inputs
    np.testing.assert_allclose(drawn[PATH].std(), std, rtol=0.01)
    assert (drawn["text_model.final_layer_norm.scale"] == 1).all()


def test_assembled_module_computes_with_the_given_arrays():
    arrays = {p: jnp.asarray(a) for p, a in initial_weights(abstract(CLIPTextModel, CONFIG), 0)}
    arrays["text_model.final_layer_norm.bias"] += 5
    template = abstract(CLIPTextModel, CONFIG)
    assert with_params(template, arrays)(jnp.ones((1, 4), jnp.int32)).mean() > 4.5
    assert isinstance(param_dict(template)[PATH], jax.ShapeDtypeStruct), "the template is unchanged"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(PATH), f"missing weights: got 1 \\({PATH}\\)"),
        (lambda a: a.update(extra=a[PATH]), "unknown weights: got 1 \\(extra\\)"),
        (
            lambda a: a.update({PATH: jnp.ones((8, 9))}),
            f"{PATH}: got shape \\(8, 9\\), expected \\(8, 8\\)",
        ),
    ],
)
def test_assemble_refuses(change, message):
    template = abstract(CLIPTextModel, CONFIG)
    arrays = {path: jnp.asarray(array) for path, array in initial_weights(template, 0)}
    change(arrays)
    with pytest.raises(InputError, match=message):
        with_params(template, arrays)
