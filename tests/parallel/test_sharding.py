"""The tables of sharding rules on published models: what is split, how, and how evenly."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxdiff.core.errors import InputError
from jaxdiff.models import presets
from jaxdiff.models.build import param_dict
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.patches import PatchEmbed
from jaxdiff.parallel.mesh import batch_sharding, make_mesh
from jaxdiff.parallel.sharding import (
    CLIP,
    DIT,
    FLUX,
    MMDIT,
    UNET,
    VAE,
    all_gather_fsdp,
    optimizer_state_shardings,
    shardings,
    spec,
)

MODELS = {
    "unet sd15": (("unet", "sd15"), UNET),
    "unet sdxl-base": (("unet", "sdxl-base"), UNET),
    "unet kandinsky22": (("unet", "kandinsky22"), UNET),
    "unet if-i-xl": (("unet", "if-i-xl"), UNET),
    "unet glide-upsample": (("unet", "glide-upsample"), UNET),
    "unet sd-x4-upscaler": (("unet", "sd-x4-upscaler"), UNET),
    "transformer dit-xl-2-256": (("transformer", "dit-xl-2-256"), DIT),
    "transformer flux-dev": (("transformer", "flux-dev"), FLUX),
    "transformer chroma": (("transformer", "chroma"), FLUX),
    "prior kandinsky22": (("prior", "kandinsky22"), DIT),
    "vae sd": (("vae", "sd"), VAE),
    "text openclip-bigg": (("text", "openclip-bigg"), CLIP),
}


@pytest.mark.parametrize(("preset", "rules"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (64, 1), (8, 4)])
def test_hardly_anything_of_a_model_is_held_twice(preset, rules, fsdp, tensor):
    """The parts of one device come to little more than the model's share."""
    table = param_dict(presets.preset(*preset).abstract())
    sizes = {"data": 1, "fsdp": fsdp, "tensor": tensor}
    total = sum(leaf.size for leaf in table.values())
    held = 0
    for path, leaf in table.items():
        axes = spec(path, leaf.shape, rules, sizes)
        ways = np.prod([sizes[axis] for axis in axes if axis], dtype=int)
        assert leaf.size % ways == 0
        held += leaf.size // ways
    assert held < total / (fsdp * tensor) * 1.6
    assert held < total / fsdp * 1.15


def test_two_products_in_a_row_split_the_width_between_them():
    sizes, P = {"data": 1, "fsdp": 2, "tensor": 4}, PartitionSpec
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    for path, shape, expected in (
        (f"{block}.attn1.to_q.kernel", (640, 640), P("fsdp", "tensor")),
        (f"{block}.attn1.to_out.0.kernel", (640, 640), P("tensor", "fsdp")),
        ("mid_block.attentions.0.add_k_proj.kernel", (64, 640), P("fsdp", "tensor")),
        ("class_embedding.embedding", (1000, 640), P(None, "fsdp")),
        (f"{block}.ff.net.0.proj.kernel", (640, 5120), P("fsdp", "tensor")),
        (f"{block}.ff.net.2.kernel", (2560, 640), P("tensor", "fsdp")),
        ("mid_block.resnets.0.conv1.kernel", (3, 3, 64, 64), P(None, None, "fsdp", "tensor")),
        ("mid_block.resnets.0.norm1.scale", (64,), P()),
        # what "fsdp" does not divide goes to the dimension that it does, and "tensor" stays out
        ("conv_out.kernel", (3, 3, 320, 3), P(None, None, "fsdp", None)),
        (f"{block}.attn1.to_q.kernel", (6, 6), P("fsdp", None)),
        ("conv_in.kernel", (3, 3, 3, 3), P(None, None, None, None)),
    ):
        assert spec(path, shape, UNET, sizes) == expected, path


def test_means_of_gradients_lie_with_their_weights():
    mesh = make_mesh(fsdp=8)
    table = {"a.kernel": jax.ShapeDtypeStruct((16, 8), np.float32)}
    rows = {"a.kernel": jax.ShapeDtypeStruct((16,), np.float32)}
    tree = ({"mu": table}, rows, jax.ShapeDtypeStruct((), np.int32))
    parts = shardings(table, UNET, mesh)
    assert parts["a.kernel"].spec == PartitionSpec(None, "fsdp")
    mu, factored, count = optimizer_state_shardings(tree, table, UNET, mesh)
    assert mu["mu"] == parts
    assert factored["a.kernel"].spec == count.spec == PartitionSpec()


def test_weights_are_whole_where_they_are_used_and_their_gradients_are_not():
    """As the compiler sees a product with a weight that lies in parts."""
    mesh = make_mesh(1, 4, 2)
    table = {"a.to_q.kernel": np.ones((16, 8), np.float32), "a.bias": np.ones(8, np.float32)}
    parts = shardings(table, UNET, mesh)
    assert parts["a.to_q.kernel"].spec == PartitionSpec("fsdp", "tensor")

    def loss(params, x):
        used = all_gather_fsdp(params, parts)
        return jnp.square(x @ used["a.to_q.kernel"] + used["a.bias"][None]).sum()

    step = jax.jit(jax.grad(loss), in_shardings=(parts, batch_sharding(mesh)))
    x = jax.ShapeDtypeStruct((8, 16), np.float32)
    compiled = step.lower(table, x).compile()
    text = compiled.as_text()
    assert "all-gather" in text
    assert "while" not in text
    found = compiled.output_shardings["a.to_q.kernel"]
    assert found.is_equivalent_to(parts["a.to_q.kernel"], 2)


def test_a_table_of_positions_is_cut_before_it_is_gathered():
    mesh = make_mesh(1, 8, 1)
    table = {"pos_embed.pos_embed": np.ones((1, 64 * 64, 16), np.float32)}
    parts = shardings(table, MMDIT, mesh)
    assert parts["pos_embed.pos_embed"].spec == PartitionSpec(None, None, "fsdp")
    layers = LayerFactory(rngs=nnx.Rngs(0))
    graph, weights = nnx.split(PatchEmbed(1, 16, 1, layers=layers, base=64, max_size=64))

    def positions(params, x):
        used = all_gather_fsdp(params, parts)
        own = {"pos_embed": nnx.Param(used["pos_embed.pos_embed"])}
        return nnx.merge(graph, nnx.State({**weights, **own}))(x)

    x = jax.ShapeDtypeStruct((8, 4, 4, 1), np.float32)
    gathered = jax.jit(positions, in_shardings=(parts, batch_sharding(mesh)))
    text = gathered.lower(table, x).compile().as_text()
    assert re.search(r"f32\[\S* all-(gather|to-all)\(", text)
    # no device has more of the table than its shard of 64 x 64 x 2 and the image's part of it
    sizes = [
        math.prod(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)
    ]
    assert max(sizes) == 64 * 64 * 2


def test_meshes():
    assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(2, 2, 2).devices[0, 0].tolist() == jax.devices()[:2]
    for wanted in ((3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (2, 2, 1)):
        with pytest.raises(InputError, match=r"mesh: got .*expected"):
            make_mesh(*wanted)
