"""Queries and keys normed by head, and rotated by the positions of their tokens."""

import functools

from jaxdiff.core.types import Array, Float
from jaxdiff.nn import head_norm_tpu
from jaxdiff.nn.attention import TPU_FROM
from jaxdiff.nn.initializers import ONES
from jaxdiff.nn.layers import LayerFactory, RMSNorm
from jaxdiff.nn.platforms import platform_dependent
from jaxdiff.nn.rotary import Rotation, rotate


class HeadNorm(RMSNorm):
    """Unit mean square of each head's channels, then scale; then a rotation, if there is one."""

    def __init__(self, width: int, *, layers: LayerFactory, eps: float):
        super().__init__(layers.param(ONES, (width,)), eps=eps, dtype=layers.dtype)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "b n h d"], by: Rotation | None = None
    ) -> Float[Array, "b n h d"]:
        """Normalise in float32, rotate in float32 what that is in the compute dtype; return so."""

        def plain(x: Array, scale: Array, by: Rotation | None) -> Array:
            normed = self.normalise(x, scale)
            return normed if by is None else rotate(normed, by)

        operands = x, self.scale[...], by
        if x.shape[1] < TPU_FROM:
            return plain(*operands)
        kernel = functools.partial(head_norm_tpu.tpu, eps=self.eps, dtype=self.dtype)
        return platform_dependent(*operands, tpu=kernel, default=plain)
