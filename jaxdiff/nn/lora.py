"""LoRA layers: kernels plus a product of two low-rank factors (2106.09685).

W' = W + scale A B, where A has few outputs. A is initialized at random and B at zero, so the change
starts at zero.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Float
from jaxdiff.nn.initializers import ZEROS, Initializer, Normal
from jaxdiff.nn.layers import ALL, Conv, Linear


def _factor(init: Initializer, *shape: int) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), init=init)


class LoRALinear(Linear):
    """y = x W + b + scale x A B, of a linear layer's own W and b."""

    def __init__(self, layer: Linear, rank: int, scale: float):
        super().__init__(layer.kernel, layer.bias, dtype=layer.dtype)
        n_in, n_out = layer.kernel.shape
        down, up = _factor(Normal(1 / rank), n_in, rank), _factor(ZEROS, rank, n_out)
        self.lora_A = Linear(down, None, dtype=layer.dtype)
        self.lora_B = Linear(up, None, dtype=layer.dtype)
        self.scale = scale

    def product(
        self, x: Float[Array, "... i"], *, rows: slice = ALL, columns: slice = ALL
    ) -> Float[Array, "... o"]:
        """x times these rows and columns of W + scale A B."""
        change = self.lora_B.product(self.lora_A.product(x, rows=rows), columns=columns)
        return super().product(x, rows=rows, columns=columns) + self.scale * change


class LoRAConv(Conv):
    """A convolution beside which a narrow one and a 1 x 1 run: LoRA's change of its kernel."""

    def __init__(self, layer: Conv, rank: int, scale: float):
        how = {"stride": layer.stride, "padding": layer.padding, "dtype": layer.dtype}
        super().__init__(layer.kernel, layer.bias, **how)
        *window, n_in, n_out = layer.kernel.shape
        down, up = _factor(Normal(1 / rank), *window, n_in, rank), _factor(ZEROS, 1, 1, rank, n_out)
        self.lora_A = Conv(down, None, **how)
        self.lora_B = Conv(up, None, stride=1, padding=((0, 0), (0, 0)), dtype=layer.dtype)
        self.scale = scale

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Apply the layer, in its compute dtype."""
        return super().__call__(x) + self.scale * self.lora_B(self.lora_A(x))
