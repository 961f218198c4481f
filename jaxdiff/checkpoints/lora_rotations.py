"""Changes of a weight that rotate blocks of its rows or columns: OFT and BOFT."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxdiff.checkpoints.lora_change import Array, Change, NDArray, Shape, along

MAX_TERMS = 100  # of a power series


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFT(Change):
    """rescale * R^T W - W, R = (I + Q) (I - Q)^-1 in blocks of rows, Q = B - B^T.

    |Q| is at most alpha times the number of rows, unless alpha is 0.
    """

    name = "OFT"
    tensors: ClassVar = {"oft_blocks": "oft_blocks", "rescale": "rescale"}
    needs_weight = True
    ndim: ClassVar[int] = 3
    oft_blocks: Array  # (..., k, b, b)
    rescale: Array | None = None
    alpha: float = 0.0

    @classmethod
    def matches(cls, shapes: Mapping[str, Shape]) -> bool:
        return super().matches(shapes) and len(shapes["oft_blocks"]) == cls.ndim

    def fits(self, shape: Shape) -> bool:
        blocks, b, width = self.oft_blocks.shape[-3:]
        scaled = self.rescale is None or self.rescale.size == shape[0]
        return len(shape) > 1 and b == width and blocks * b == shape[0] and scaled

    def delta(self, weight: Array) -> Array:
        rotated = self._rotate(weight)
        if self.rescale is not None:
            rotated = rotated * along(self.rescale, 0, weight.ndim)
        return (rotated - weight).astype(np.float32)

    def _rotations(self, rows: int) -> NDArray:
        q = self.oft_blocks.astype(np.float64)
        q = q - q.swapaxes(-1, -2)
        if self.alpha > 0:
            q = q * min(1.0, self.alpha * rows / (np.linalg.norm(q) + 1e-8))
        one = np.identity(q.shape[-1])
        return (one + q) @ np.linalg.inv(one - q)

    def _rotate(self, weight: Array) -> NDArray:
        rotations = self._rotations(len(weight))
        rows = weight.reshape(*rotations.shape[:2], -1)
        return np.einsum("knm,knx->kmx", rotations, rows).reshape(weight.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BOFT(OFT):
    """OFT in stages, W <- R W; the blocks of stage n take rows that are 2^n b / 2 apart."""

    name = "BOFT"
    ndim = 4

    def fits(self, shape: Shape) -> bool:
        stages, _, b, _ = self.oft_blocks.shape
        return super().fits(shape) and b % 2 == 0 and shape[0] % (2 ** (stages - 1) * b) == 0

    def _rotate(self, weight: Array) -> NDArray:
        rows, columns = len(weight), math.prod(weight.shape[1:])
        result = weight.reshape(rows, columns)
        for stage, rotations in enumerate(self._rotations(rows)):
            b = rotations.shape[-1]
            apart = 2**stage * b // 2
            paired = result.reshape(-1, 2, apart, columns).swapaxes(1, 2).reshape(-1, b, columns)
            turned = np.einsum("kij,kjx->kix", rotations, paired)
            result = turned.reshape(-1, apart, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        return result.reshape(weight.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftOFT(Change):
    """W R^T - W, R in blocks of columns, of the upper triangles of Q.

    R = (I - Q) (I + Q)^-1; with `terms` so many of I + 2 Q + 2 Q^2 + ..., the last of them halved.
    """

    name = "OFT"
    tensors: ClassVar = {"oft_R": r"oft_R(\.\w+)?\.weight"}
    needs_weight = True
    oft_R: Array  # noqa: N815 (PEFT's name; k, b (b - 1) / 2)
    terms: int | None = None

    @classmethod
    def options(cls, setting: Callable[[str], Any], module: str) -> dict[str, Any]:
        del module
        if setting("oft_block_size") is None and setting("r") is None:
            raise ValueError("OFT without PEFT's settings, expected adapter_config.json beside it")
        if setting("coft"):
            raise ValueError("coft true, expected false (constrained OFT is not supported)")
        if setting("use_cayley_neumann") is False:
            return {}
        terms = setting("num_cayley_neumann_terms")
        terms = 5 if terms is None else terms
        if not isinstance(terms, int) or not 0 < terms <= MAX_TERMS:
            raise ValueError(f"num_cayley_neumann_terms {terms!r}, expected 1 to {MAX_TERMS}")
        return {"terms": terms}

    @property
    def _block(self) -> int:
        """b, of the b (b - 1) / 2 numbers of a triangle; 0 for other numbers."""
        numbers = self.oft_R.shape[1]
        b = (1 + math.isqrt(1 + 8 * numbers)) // 2
        return b if b * (b - 1) // 2 == numbers else 0

    def fits(self, shape: Shape) -> bool:
        if self.oft_R.ndim != 2 or len(shape) < 2 or self._block == 0:
            return False
        columns = math.prod(shape[1:])
        shared = len(self.oft_R) == 1 and columns % self._block == 0
        return shared or len(self.oft_R) * self._block == columns

    def delta(self, weight: Array) -> Array:
        b = self._block
        columns = weight.reshape(len(weight), -1, b)
        turned = np.einsum(
            "okc,krc->okr", columns, np.broadcast_to(self._rotations(), (columns.shape[1], b, b))
        )
        return (turned.reshape(weight.shape) - weight).astype(np.float32)

    def _rotations(self) -> NDArray:
        b = self._block
        q = np.zeros((len(self.oft_R), b, b))
        q[:, *np.triu_indices(b, 1)] = self.oft_R
        q, one = q - q.swapaxes(-1, -2), np.identity(b)
        if self.terms is None:
            return (one - q) @ np.linalg.inv(one + q)
        # PEFT's loop adds a fourth term where three are asked for.
        halved = [2] * (self.terms - 1) if self.terms < 3 else [2] * (max(self.terms, 4) - 2) + [1]
        total, power = np.broadcast_to(one, q.shape), q
        for factor in halved:
            total, power = total + factor * power, power @ q
        return total
