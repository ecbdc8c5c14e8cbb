"""The noise of a seed, as torch draws it on a CPU, in numpy: a seed means the same picture without torch.

Facts about torch: its CPU generator is MT19937, seeded with the lower 32 bits of the seed. A tensor of 16
numbers or more is filled with uniform ones of 24 bits, and each block of 16 goes through the Box-Muller
transform in fp32; if the size is no multiple of 16, the last 16 are drawn once more. Smaller tensors are
drawn one by one in fp64, and the second number of a pair is kept for the next of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BLOCK = 16
_TWO_PI = np.float32(2 * math.pi)


class NoiseSource:
    """Draws what ``torch.randn`` draws with ``torch.Generator().manual_seed(seed)``.

    The last bits differ: torch's logarithm and cosine are approximations that depend on the processor.

    Args:
        seed: 0 to 2**64 - 1.
    """

    def __init__(self, seed: int) -> None:
        # numpy keeps this legacy generator as it is for good; its seeding is that of MT19937's authors
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._kept: float | None = None

    def normal(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Draw N(0, 1) fp32 in the given shape; each call goes on where the last one ended."""
        count = math.prod(shape)
        values = self._many(count) if count >= _BLOCK else self._few(count)
        return values.reshape(tuple(shape))

    def _many(self, count: int) -> NDArray[np.float32]:
        values = self._uniform(count)
        whole = count // _BLOCK * _BLOCK
        values[:whole] = _box_muller(values[:whole])
        if whole < count:
            values[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return values

    def _few(self, count: int) -> NDArray[np.float32]:
        return np.array([self._next() for _ in range(count)], np.float32)

    def _next(self) -> float:
        if self._kept is not None:
            value, self._kept = self._kept, None
            return value
        angle, uniform = 2 * math.pi * self._uniform53(), self._uniform53()
        radius = math.sqrt(-2 * math.log1p(-uniform))
        self._kept = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform(self, count: int) -> NDArray[np.float32]:
        """[0, 1) in steps of 2^-24, exact in fp32."""
        words = self._words.randint(0, 1 << 32, count, dtype=np.uint32)
        values: NDArray[np.float32] = (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
        return values

    def _uniform53(self) -> float:
        high, low = self._words.randint(0, 1 << 32, 2, dtype=np.uint32).tolist()
        return float((high << 32 | low) & (1 << 53) - 1) * 2**-53


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Blocks of 16: eight radii, then eight angles, become eight cosines, then eight sines."""
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    # angles are rounded to fp32 as there; the rest is as good as fp32 can say
    angles = (_TWO_PI * blocks[:, 1]).astype(np.float64)
    radii = np.sqrt(-2 * np.log((1 - blocks[:, 0]).astype(np.float64)))
    pairs = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    return pairs.astype(np.float32).reshape(-1)
