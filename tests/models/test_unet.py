"""The UNet's boundary: what its config and its inputs may be, and the dtypes inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import abstract, initial_weights, initialise, param_dict, with_params
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.unet.unet_2d_config import UNet2DConfig

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
    "layers_per_block": 1,
}
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 7 + 6 * 4,
}
PLAIN = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "mid_block_type": None,
    "cross_attention_dim": None,
}

SIMPLE = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
}
IMAGE = SIMPLE | {
    "addition_embed_type": "image",
    "encoder_hid_dim": 5,
    "encoder_hid_dim_type": "image_proj",
    "out_channels": 8,
}
MASK = jax.ShapeDtypeStruct((2, 5), bool)


def shapes(**changes):
    made = {
        "sample": jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32),
        "timesteps": jax.ShapeDtypeStruct((2,), jnp.float32),
        "context": jax.ShapeDtypeStruct((2, 5, 6), jnp.float32),
    }
    return {name: x for name, x in (made | changes).items() if x is not None}


def traced(inputs, options=None, **fields):
    unet = abstract(UNet2DConditionModel, UNet2DConditionConfig(**SMALL | fields), **options or {})
    call = jax.make_jaxpr(lambda p, x: with_params(unet, p)(**x), return_shape=True)
    return call(param_dict(unet), inputs)


def test_new_network_starts_at_zero():
    """Its last convolution and the ends of its residual branches do."""
    template = abstract(UNet2DConditionModel, UNet2DConditionConfig(**SMALL))
    first = dict(initial_weights(template, seed=0))
    zero = {path for path, array in first.items() if path.endswith("kernel") and not array.any()}
    ends = (".conv2.kernel", ".proj_out.kernel")
    assert zero == {"conv_out.kernel", *(path for path in first if path.endswith(ends))}


def dots(jaxpr):
    """Input dtypes of all matrix products and convolutions, those in inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield tuple(str(v.aval.dtype) for v in equation.invars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from dots(getattr(inner, "jaxpr", inner))


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_perturbing_needs_attention_in_the_middle():
    mask = jnp.array([True, False])
    with pytest.raises(InputError, match="got perturbed attention for a UNet without"):
        traced(shapes(perturbed=mask, context=None), **PLAIN)


def test_a_fresh_network_does_not_heed_the_scale_it_is_told():
    config = UNet2DConditionConfig(**SMALL, time_cond_proj_dim=8)
    unet = initialise(UNet2DConditionModel, config, seed=0)
    assert not unet.time_embedding.cond_proj.kernel[...].any()


@pytest.mark.parametrize("name", ["hint", "noise level", "classes"])
def test_conditioning_is_computed_in_the_dtype(name):
    unet = abstract(
        UNet2DConditionModel, UNet2DConditionConfig(**SMALL | VARIANTS[name]), dtype=jnp.bfloat16
    )
    cond = {
        key: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype)
        for key, leaf in UNetAdapter(unet, "epsilon").conditioning_shapes((8, 8), 5).items()
    }
    inputs = shapes(context=None)
    jaxpr = jax.make_jaxpr(UNetAdapter(unet, "epsilon"))(
        param_dict(unet), inputs["sample"], inputs["timesteps"], cond
    )
    assert set(dots(jaxpr.jaxpr)) == {("bfloat16", "bfloat16")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_computes_in_its_dtype_and_returns_the_samples(dtype):
    jaxpr, out = traced(shapes(), {"dtype": jnp.dtype(dtype)})
    assert (out.shape, out.dtype) == ((2, 8, 8, 4), jnp.float32)
    found = list(dots(jaxpr.jaxpr))
    assert len(found) > 40
    assert set(found) == {(dtype, dtype)}


def test_same_image_alone_or_in_a_batch():
    unet = initialise(UNet2DConditionModel, UNet2DConditionConfig(**SMALL), seed=0)
    unet.conv_out.kernel[...] = jnp.ones_like(unet.conv_out.kernel[...])
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 4))
    t, c = jnp.array([1.0, 500.0, 999.0]), jax.random.normal(jax.random.key(1), (3, 5, 6))
    call = jax.jit(lambda x, t, c: unet(x, t, c))
    together = call(x, t, c)
    for i in range(3):
        alone = call(x[i : i + 1], t[i : i + 1], c[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({}, {"context": None}, "context: got none, expected an array"),
        (
            {},
            {"context": jax.ShapeDtypeStruct((2, 5, 7), jnp.float32)},
            r"context: got shape \(2, 5, 7\), expected \(2, any, 6\)",
        ),
        (
            {},
            {"sample": jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)},
            r"sample: got shape \(2, 8, 8, 3\), expected \(any, any, any, 4\)",
        ),
        ({}, {"time_ids": jax.ShapeDtypeStruct((2, 6), jnp.float32)}, "time_ids: got an array"),
        ({"time_cond_proj_dim": 8}, {}, "timestep_cond: got none, expected an array"),
        (PLAIN, {}, "context: got an array, expected none for this model"),
        (ADDED, {}, "text_embeds: got none, expected an array"),
        (
            {"num_class_embeds": 9},
            {"class_labels": jax.ShapeDtypeStruct((2, 3), jnp.float32)},
            r"class_labels: got shape \(2, 3\), expected \(2\)",
        ),
        ({"class_embed_type": "identity"}, {}, "class_labels: got none, expected an array"),
        ({}, {"context_mask": MASK}, "context_mask: got an array, expected none for this model"),
        (
            SIMPLE,
            {"context_mask": jax.ShapeDtypeStruct((2, 4), bool)},
            r"context_mask: got shape \(2, 4\), expected \(2, 5\)",
        ),
        (
            SIMPLE,
            {"sample": jax.ShapeDtypeStruct((2, 8, 7, 4), jnp.float32)},
            "sample: got 8 rows and 7 columns, expected multiples of 2",
        ),
        (IMAGE, {"context": None}, "image_embeds: got none, expected an array"),
        (
            ADDED,
            {
                "text_embeds": jax.ShapeDtypeStruct((2, 7), jnp.float32),
                "time_ids": jax.ShapeDtypeStruct((2, 5), jnp.float32),
            },
            "text_embeds and embedded time_ids: got width 27, expected 31",
        ),
    ],
)
def test_inputs_must_be_those_of_the_config(fields, changes, message):
    with pytest.raises(InputError, match=message):
        traced(shapes(**changes), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_embed_type": "simple_projection"}, "class_embed_type: got 'simple_projection'"),
        ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim: got null"),
        (
            {"class_embed_type": "timestep", "num_class_embeds": 9},
            "num_class_embeds: got 9 with class_embed_type timestep, expected one of both",
        ),
        ({"class_embeddings_concat": True}, "class_embeddings_concat: got true, expected false"),
        ({"addition_embed_type": "image"}, "encoder_hid_dim: got null, expected a width for image"),
        (
            {"addition_embed_type": "text", "cross_attention_dim": (6, 6)},
            r"cross_attention_dim: got \(6, 6\), expected one width",
        ),
        (
            {"addition_embed_type": "text", "encoder_hid_dim": 9}
            | {"encoder_hid_dim_type": "image_proj"},
            "addition_embed_type: got 'text' with the context of an image",
        ),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type: got 'ip_image_proj'"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim: got null"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm: got 'layer_norm'"),
        ({"learned_variance": True, "out_channels": 5}, "out_channels: got 5, expected an even"),
        ({"time_embedding_act_fn": "selu"}, "time_embedding_act_fn: got 'selu'"),
        ({"dual_cross_attention": True}, "dual_cross_attention: got True"),
        ({"only_cross_attention": (True,)}, "only_cross_attention: got 1 entries, expected 2"),
        ({"num_attention_heads": 4}, "num_attention_heads: got 4"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type: got 'fourier'"),
        ({"dropout": 0.1}, "dropout: got 0.1"),
        ({"act_fn": "selu"}, "act_fn: got 'selu'"),
        ({"mid_block_type": "UNetMidBlock2DAttn"}, "mid_block_type: got"),
        ({"down_block_types": ("DownBlock2D", "KDownBlock2D")}, "down_block_types: got 'KDown"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types: got 1 entries, expected 2"),
        ({"layers_per_block": (1, 2, 3)}, "layers_per_block: got 3 entries, expected 2"),
        ({"transformer_layers_per_block": ((1,), 2)}, "reverse_transformer_layers_per_block"),
        ({"cross_attention_dim": None}, "cross_attention_dim: got None|cross_attention_dim: got n"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim: got null"),
    ],
)
def test_config_refuses_what_is_not_there(fields, message):
    with pytest.raises(InputError, match=message):
        UNet2DConditionConfig(**SMALL | fields)


def test_sizes_that_do_not_divide():
    for fields, message in (
        ({"norm_num_groups": 3}, "norm_num_groups: got 3"),
        ({"attention_head_dim": 3}, "attention heads: got 3, expected a divisor of width 8"),
        (SIMPLE | {"attention_head_dim": 3}, "width of an attention head: got 3, expected a"),
        (
            {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
            "addition_embed_type_num_heads: got 4, expected a divisor of 6",
        ),
    ):
        with pytest.raises(InputError, match=message):
            abstract(UNet2DConditionModel, UNet2DConditionConfig(**SMALL | fields))


VARIANTS = {
    "plain": PLAIN,
    "text": {},
    "sizes": ADDED,
    "inpainting": {"in_channels": 9},
    "distilled": {"time_cond_proj_dim": 4},
    "image": IMAGE,
    "hint": IMAGE | {"addition_embed_type": "image_hint", "in_channels": 8},
    "noise level": SIMPLE | {"in_channels": 8, "out_channels": 8, "class_embed_type": "timestep"},
    "classes": {"num_class_embeds": 9},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_adapter_calls_the_network_with_the_conditioning_that_it_names(name):
    """As programs of the same arguments: equal ones compute the same."""
    unet = abstract(UNet2DConditionModel, UNet2DConditionConfig(**SMALL | VARIANTS[name]))
    network, inputs = UNetAdapter(unet, "epsilon"), shapes(context=None)
    cond = {
        key: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype)
        for key, leaf in network.conditioning_shapes((8, 8), tokens=5).items()
    }

    def direct(params, x, t, cond):
        own = dict(cond)
        if "channels" in own:
            x = jnp.concatenate([x, own.pop("channels")], axis=-1)
        output = with_params(unet, params)(x, t, **own)
        return output[..., : unet.config.channels[1]]

    given = param_dict(unet), inputs["sample"], inputs["timesteps"], cond
    found, expected = (jax.make_jaxpr(f, return_shape=True)(*given) for f in (network, direct))
    assert str(found[0]) == str(expected[0])
    assert found[1].shape == inputs["sample"].shape


def test_adapters_of_equal_networks_are_equal():
    config = UNet2DConditionConfig(**SMALL)
    first, second = (
        UNetAdapter(initialise(UNet2DConditionModel, config, seed=seed), "epsilon")
        for seed in (0, 1)
    )
    assert first == second
    assert hash(first) == hash(second)
    assert first != UNetAdapter(first.module, "v_prediction")
    wide = UNet2DConditionConfig(**SMALL | {"attention_head_dim": 4})
    assert first != UNetAdapter(abstract(UNet2DConditionModel, wide), "epsilon")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type: got 'fourier'"),
        ({"class_embed_type": "projection"}, "class_embed_type: got 'projection'"),
        ({"down_block_types": ("SimpleCrossAttnDownBlock2D",) * 4}, "down_block_types: got 'Simp"),
        ({"mid_block_scale_factor": 2.0}, "mid_block_scale_factor: got 2.0 with add_attention"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups: got null with resnet"),
        ({"block_out_channels": (32, 64)}, "down_block_types: got 4 entries, expected 2"),
    ],
)
def test_config_without_text_refuses_what_is_not_there(fields, message):
    with pytest.raises(InputError, match=message):
        UNet2DConfig(**fields)
