"""The sampling loop as shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import abstract, param_dict
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.parallel.mesh import sampling_mesh
from jaxdiff.parallel.sharding import infer_shardings
from jaxdiff.pipeline.on_mesh import OnMesh
from jaxdiff.planning import sampling
from jaxdiff.planning.published_models import published_component

OPTIONS = sampling.SamplingOptions(plan=(), model="nowhere")
CONFIG = UNet2DConditionConfig(
    sample_size=8,
    block_out_channels=(16,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=16,
    attention_head_dim=2,
)


def model_of(network):
    """The model of a network, with a VAE."""
    return sampling.SampledModel(network, abstract(AutoencoderKL, AutoencoderKLConfig()), 77)


def traced_on(network, sizes, devices):
    """The loop for two images on a mesh of these sizes."""
    mesh = sampling_mesh(sizes, devices)
    params = sampling.place_shapes(
        param_dict(network.module), lambda shapes: infer_shardings(shapes, mesh)
    )
    return sampling.trace_loop(OPTIONS, model_of(network), params, 2, OnMesh(mesh))


def test_a_mesh_divides_the_weights_and_the_work():
    network = UNetAdapter(
        abstract(UNet2DConditionModel, CONFIG, dtype=jnp.float32, param_dtype=jnp.float32),
        "epsilon",
    )
    one, eight = (
        traced_on(network, sizes, jax.devices()[:n]).lower().compile()
        for sizes, n in (({}, 1), ({"fsdp": 2, "guidance": 2, "tensor": 2}, 8))
    )
    sizes = [p.memory_analysis().argument_size_in_bytes for p in (one, eight)]
    assert sizes[1] < 0.4 * sizes[0]
    assert eight.cost_analysis()["flops"] < 0.3 * one.cost_analysis()["flops"]


@pytest.mark.parametrize("added", [False, True])
def test_the_loop_traces_with_and_without_sizes(added):
    more = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 6 * 4,
    }
    config = dataclasses.replace(CONFIG, **(more if added else {}))
    unet = abstract(UNet2DConditionModel, config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    network = UNetAdapter(unet, "epsilon")
    traced = traced_on(network, {}, jax.devices()[:1])
    assert jax.tree.leaves(traced.out_info)[0].shape == (2, 8, 8, 4)


def test_guidance_doubles_the_work_and_scale_one_does_not():
    network = UNetAdapter(abstract(UNet2DConditionModel, CONFIG, dtype=jnp.bfloat16), "epsilon")
    model, plain = model_of(network), dataclasses.replace(OPTIONS, guidance_scale=1.0)
    assert sampling._flops(OPTIONS, model, 3) == 2 * sampling._flops(plain, model, 3)


def test_published_networks_need_no_file():
    unet = published_component("stabilityai/stable-diffusion-2-1/unet", dtype=jnp.bfloat16)
    assert isinstance(unet, UNet2DConditionModel)
    assert unet.config.attention_head_dim == (5, 10, 20, 20)
    with pytest.raises(InputError, match=r"got some/model/unet without a config.json"):
        published_component("some/model/unet", dtype=jnp.bfloat16)
