"""The TPU compiler's estimates for parts of networks, on a machine without a TPU.

    python benchmarks/tpu_blocks.py --part resnet --batch-sizes 4 8 16
    python benchmarks/tpu_blocks.py --part perceptron
    python benchmarks/tpu_blocks.py --part kernels
    python benchmarks/tpu_blocks.py --part transformer
    python benchmarks/tpu_blocks.py --part flux-single --topology v6e:2x2 --forward --batch-sizes 1

Of SD 1.5's first level: "self" and "cross" are an attention layer with its projections, "kernels"
are those of the former alone. "flux-double" and "flux-single" are a block of FLUX.1 at 1024x1024
pixels and 512 tokens of text. Cycles of one chip for one image, forwards and backwards unless
`--forward` is given; needs requirements-plan.txt.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.flux.blocks import position_ids
from jaxdiff.models.flux.config import FluxTransformer2DConfig
from jaxdiff.models.flux.module import FluxSingleTransformerBlock, FluxTransformerBlock
from jaxdiff.nn.attention import attention
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.resnet import ResnetBlock
from jaxdiff.nn.rotary import rotation
from jaxdiff.nn.transformer import Attention, FeedForward, SpatialTransformer
from jaxdiff.planning.compilers import configure_compiler
from jaxdiff.planning.compiling import compile_traced
from jaxdiff.planning.topology import parse_topology, topology_devices

SIDE, CHANNELS, HEADS, TIME = 64, 320, 8, 1280
TOKENS, WORDS, CONTEXT = SIDE * SIDE, 77, 768
PARTS = (
    *("resnet", "perceptron", "kernels", "self", "cross", "transformer"),
    *("flux-double", "flux-single"),
)
FLUX, FLUX_WORDS, FLUX_GRID = FluxTransformer2DConfig(), 512, (64, 64)
LAYERS = LayerFactory(rngs=None, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


class Perceptron(nnx.Module):
    """The end of a transformer block."""

    def __init__(self):
        self.norm = LAYERS.layer_norm(CHANNELS)
        self.ff = FeedForward(CHANNELS, layers=LAYERS)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x + perceptron(norm(x))."""
        return x + self.ff(self.norm(x))


def shape(*sides: int) -> jax.ShapeDtypeStruct:
    """Of an array in bfloat16."""
    return jax.ShapeDtypeStruct(sides, jnp.bfloat16)


def part(name: str, batch: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function, and the shapes of its arguments, weights first."""
    tokens, words = shape(batch, TOKENS, CHANNELS), shape(batch, WORDS, CONTEXT)
    image = shape(batch, SIDE, SIDE, CHANNELS)
    if name == "kernels":
        heads = shape(batch, TOKENS, HEADS, CHANNELS // HEADS)
        return lambda q, k, v: attention(q, k, v, backend="tpu"), (heads,) * 3
    if name == "perceptron":
        module, inputs = Perceptron(), (tokens,)
    elif name == "self":
        module, inputs = Attention(CHANNELS, layers=LAYERS, heads=HEADS), (tokens,)
    elif name == "cross":
        module = Attention(CHANNELS, layers=LAYERS, heads=HEADS, context_width=CONTEXT)
        inputs = (tokens, words)
    elif name == "transformer":
        module = SpatialTransformer(
            CHANNELS,
            layers=LAYERS,
            heads=HEADS,
            context_width=CONTEXT,
            depth=1,
            groups=32,
            linear=False,
        )
        inputs = (image, words)
    else:
        module = ResnetBlock(
            CHANNELS, CHANNELS, layers=LAYERS, groups=32, eps=1e-5, act="silu", time_width=TIME
        )
        inputs = (image, shape(batch, TIME))
    return lambda params, *x: with_params(module, params)(*x), (param_dict(module), *inputs)


def flux_part(name: str, batch: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """As `part`, of a block of FLUX.1 and the rotation of its positions."""
    ids = position_ids(FLUX_WORDS, (FLUX_GRID,))
    embedding, tokens = shape(batch, FLUX.width), math.prod(FLUX_GRID)
    module: Any
    if name == "flux-double":
        module = FluxTransformerBlock(FLUX, layers=LAYERS)
        inputs = shape(batch, tokens, FLUX.width), shape(batch, FLUX_WORDS, FLUX.width), embedding
    else:
        module = FluxSingleTransformerBlock(FLUX, layers=LAYERS)
        inputs = shape(batch, FLUX_WORDS + tokens, FLUX.width), embedding

    def block(params: Any, *x: Any) -> Any:
        out = with_params(module, params)(*x, rotation(ids, FLUX.axes_dims_rope))
        return jnp.concatenate(out, axis=1) if isinstance(out, tuple) else out

    return block, (param_dict(module), *inputs)


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--topology", default="v5e:2x2", help="of which one chip is asked for")
    parser.add_argument("--forward", action="store_true", help="without gradients")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    topology = parse_topology(options.topology)
    configure_compiler(topology.chip)
    here = SingleDeviceSharding(topology_devices(topology)[0])
    for batch in options.batch_sizes:
        of_flux = options.part.startswith("flux")
        function, shapes = (flux_part if of_flux else part)(options.part, batch)

        def loss(arguments: Any, direction: jax.Array, function=function) -> jax.Array:
            return jnp.sum((function(*arguments) * direction).astype(jnp.float32))

        direction = jax.eval_shape(function, *shapes)
        timed = function if options.forward else jax.value_and_grad(loss)
        step = jax.jit(timed, in_shardings=here, out_shardings=here)
        traced = step.trace(*shapes) if options.forward else step.trace(shapes, direction)
        found = compile_traced(traced, topology, transformer=of_flux)
        cycles = [total / batch / 1e6 for total in (found.cycles or 0, found.kernel_cycles)]
        print(f"{options.part}, {batch} images: {cycles[0]:.2f} M cycles an image", end="")
        print(f" and {cycles[1]:.2f} M in kernels")


if __name__ == "__main__":
    main()
