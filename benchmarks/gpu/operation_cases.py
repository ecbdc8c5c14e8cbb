"""Arguments of every fused operation at a model's widths and awkward sizes, for comparing backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sana_edge.fused import ops
from works.shapes import DENOISERS

# images, and a latent whose tokens are a multiple of no tile
IMAGES = 2


@dataclass(frozen=True)
class Maker:
    """Random tensors of a dtype on a device; ``size``: the latent's height and width."""

    shapes: str
    dtype: torch.dtype
    device: torch.device
    size: tuple[int, int]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.device)

    def half(self, *shape: int) -> Tensor:
        return self.randn(*shape).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """0.5 to 1.5."""
        return (torch.rand(shape) + 0.5).to(self.device)

    def int8(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8).to(self.device)

    def product(self, depth: int, columns: int) -> tuple[Tensor, ...]:
        """Values, scales, weight, its scales and bias; results are near 1."""
        rows = (IMAGES, self.size[0] * self.size[1])
        # uniform integers have a standard deviation of 73
        scales, weight_scales = self.uniform(*rows) / 73, self.uniform(columns) / (73 * depth**0.5)
        return self.int8(*rows, depth), scales, self.int8(columns, depth), weight_scales, self.randn(columns)

    def convolution(self, depth: int, *outer: int) -> tuple[Tensor, ...]:
        """The same of a map, with one scale; outer: the weight's shape but for the depth."""
        taps = outer[-1] * outer[-2] * depth
        columns = int(torch.tensor(outer[:-2]).prod())
        values = self.int8(IMAGES, *self.size, depth)
        scale = torch.tensor(1 / 73, device=self.device)
        bias = self.randn(outer[-3])
        return values, scale, self.int8(*outer, depth), self.uniform(columns) / (73 * taps**0.5), bias

    def arguments(self) -> dict[str, tuple[Any, ...]]:
        """Of `ops.OPERATIONS`, but for the backend."""
        config = DENOISERS[self.shapes]
        C, heads, hidden = config.dim, config.num_attention_heads, config.ffn_dim
        height, width = self.size
        B, N = IMAGES, height * width
        x, scale = self.half(B, N, C), torch.tensor(0.03, device=self.device)
        table = self.randn(B, 2, C).unsqueeze(2).unbind(1)
        return {
            "quantize_rows": (x, None),
            "norm_modulate_quantize": (x, *table, 1e-6, scale),
            "dwconv_glu_quantize": (
                *(self.half(B, N, 2 * hidden), self.randn(3, 3, 2 * hidden) / 3, self.randn(2 * hidden)),
                *(height, width, None),
            ),
            "w8a8_linear": (*self.product(C, 2 * hidden), self.dtype, True),
            "w8a8_linear_add_": (
                *(x, *self.product(hidden, C), 60000.0, self.randn(C), self.randn(B, 1, C)),
            ),
            "qkv_linear_attention": (*self.product(C, 3 * C), self.dtype, heads, None),
            "qk_norm_linear_attention": (self.half(B, N, 3 * C), self.uniform(C), heads, 1e-5, None),
            "linear_attention_finish": (
                *(x, self.uniform(B, heads, 33, 32), 1e-15, self.uniform(B, N, 2), self.uniform(C), scale),
            ),
            "cross_attention_quantize": self._cross(),
            "patch_embed": (
                *(self.randn(B, config.in_channels, height, width), self.randn(config.in_channels, C) / 6),
                *(self.randn(C), self.randn(N, C), 2, self.dtype),
            ),
            "velocity_head": (
                *(x, *table, 1e-6, self.randn(config.out_channels, C) / C**0.5),
                *(self.randn(config.out_channels), torch.tensor(4.5, device=self.device), height, width),
            ),
            "w8a8_conv2d": (
                *(*self.convolution(64, 4, 32, 2, 2), self.dtype, "phases", "silu", None, 1, scale),
            ),
            "w8a8_conv2d_add_": (
                *(self.half(B, height, width, 128), *self.convolution(128, 128, 3, 3)),
                *(self.uniform(128), self.randn(128), 1e-5),
            ),
        }

    def _cross(self) -> tuple[Any, ...]:
        config, N = DENOISERS[self.shapes], self.size[0] * self.size[1]
        heads, d = config.num_cross_attention_heads, config.cross_attention_head_dim
        keys, values = self.half(2, IMAGES, heads, 304, d).unbind(0)
        lengths = torch.tensor([7, 300], dtype=torch.int32, device=self.device)
        transposed = values.transpose(2, 3).contiguous()
        q = self.half(IMAGES, N, heads * d)
        return q, keys, transposed, lengths, self.uniform(heads * d), 1e-5, None


def results(make: Maker, name: str, backend: str) -> list[Tensor]:
    """What a backend computes of an operation, with what it wrote in place; the same arguments every time."""
    torch.manual_seed(0)
    given = make.arguments()[name]
    result = getattr(ops, name)(*given, backend)
    result = given[0] if result is None else result
    return [result] if isinstance(result, Tensor) else list(result)
