"""Every CUDA kernel at SANA's sizes: how to call it, what it computes and moves, and what it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.bench.shapes import DENOISERS
from sana_edge.config import LATENT_CELL, DenoiserConfig
from sana_edge.fused.text import CAPACITY
from sana_edge.kernels.cuda import launch

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    calls: how often a step runs it; operations: of INT8 products, 2 per multiplication with its addition;
    moved: bytes that it must read and write at least; run: starts it; replaced: starts what PyTorch has.
    """

    kernel: str
    size: str
    calls: int
    operations: int
    moved: int
    run: Callable[[], object]
    replaced: Callable[[], object] | None = None


@dataclass(frozen=True)
class Sizes:
    """Of a step: ``images`` have ``tokens`` each, ``prompted`` of them read a prompt of ``length`` tokens."""

    config: DenoiserConfig
    side: int
    images: int
    prompted: int
    length: int

    @classmethod
    def of(cls, shapes: str, side: int, pictures: int, guided: bool, length: int) -> Sizes:
        """Of a model's step for so many pictures, whose empty negative prompt is folded."""
        return cls(DENOISERS[shapes], side, pictures * (2 if guided else 1), pictures, length)

    @property
    def tokens(self) -> int:
        return (self.side // LATENT_CELL) ** 2

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    @property
    def asked(self) -> int:
        """Rows that attend to a prompt."""
        return self.prompted * self.tokens


def cases(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The twelve kernels of a block, and the two at the ends; tensors are made when a case is asked for."""
    for case in (
        *(_norm, _qkv, _finish, _out, _quantize, _cross_q, _cross_attention, _cross_out),
        *(_expand, _depthwise, _project, _patch, _head),
    ):
        yield case(sizes, _Tensors(device, dtype))


class _Tensors:
    """Random tensors, the same for the same order of calls."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def float(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    def half(self, *shape: int) -> Tensor:
        return self.float(*shape).to(self.dtype)

    def int8(self, *shape: int) -> Tensor:
        return torch.randint(
            -127, 128, shape, generator=self._generator, device=self.device, dtype=torch.int8
        )

    def scales(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self.device).add_(0.5).mul_(1e-3)


def _norm(sizes: Sizes, make: _Tensors) -> Case:
    C = sizes.config.dim
    x, scale, shift = make.half(sizes.images, sizes.tokens, C), make.float(C), make.float(C)
    scale16, shift16 = scale.to(x.dtype), shift.to(x.dtype)

    def replaced() -> object:
        return _quantized(F.layer_norm(x, (C,), eps=EPS) * scale16 + shift16)

    return Case(
        "norm_modulate_quantize",
        f"{sizes.rows}x{C}",
        2 * sizes.config.num_layers,
        0,
        3 * sizes.rows * C,
        lambda: launch.norm_modulate_quantize(x, scale, shift, EPS),
        replaced,
    )


def _quantize(sizes: Sizes, make: _Tensors) -> Case:
    C = sizes.config.dim
    x = make.half(sizes.prompted, sizes.tokens, C)
    return Case(
        "quantize_rows",
        f"{sizes.asked}x{C}",
        sizes.config.num_layers,
        0,
        3 * sizes.asked * C,
        lambda: launch.quantize_rows(x),
        lambda: _quantized(x),
    )


def _qkv(sizes: Sizes, make: _Tensors) -> Case:
    config, C, B, N = sizes.config, sizes.config.dim, sizes.images, sizes.tokens
    heads = config.num_attention_heads
    values, scales = make.int8(B, N, C), make.scales(B, N)
    weight, columns = make.int8(3 * C, C), make.scales(3 * C)
    workspace = launch.workspace(B, N, heads, make.device)

    def replaced() -> object:
        sums = torch._int_mm(values.view(-1, C), weight.t())
        q, k, v = (sums.float() * scales.view(-1, 1) * columns).to(make.dtype).view(B, N, -1).chunk(3, -1)
        k, v = (t.float().view(B, N, heads, -1).transpose(1, 2) for t in (k.relu(), v))
        return q.relu(), k.transpose(2, 3) @ v, k.sum(2)

    return Case(
        "qkv_linear_attention",
        f"{sizes.rows}x{3 * C}x{C}",
        config.num_layers,
        2 * sizes.rows * 3 * C * C,
        sizes.rows * C + 3 * C * C + 2 * sizes.rows * C,
        lambda: launch.qkv_linear_attention(
            values, scales, weight, columns, None, make.dtype, heads, workspace=workspace
        ),
        replaced,
    )


def _finish(sizes: Sizes, make: _Tensors) -> Case:
    config, C, B, N = sizes.config, sizes.config.dim, sizes.images, sizes.tokens
    heads = config.num_attention_heads
    q, state = make.half(B, N, C).relu(), make.float(B, heads, C // heads + 1, C // heads).abs()

    def replaced() -> object:
        q32 = q.float().view(B, N, heads, -1).transpose(1, 2)
        read = (q32 @ state[:, :, :-1]) / (q32 @ state[:, :, -1:].transpose(2, 3) + 1e-15)
        return _quantized(read.transpose(1, 2).flatten(2).to(q.dtype))

    return Case(
        "linear_attention_finish",
        f"{sizes.rows}x{C}",
        config.num_layers,
        0,
        3 * sizes.rows * C + state.numel() * 4,
        lambda: launch.linear_attention_finish(q, state, 1e-15),
        replaced,
    )


def _linear(
    sizes: Sizes,
    make: _Tensors,
    name: str,
    rows: tuple[int, int],
    N: int,
    K: int,
    *,
    gate: bool = False,
    residual: bool = False,
    silu: bool = False,
) -> Case:
    values, scales = make.int8(*rows, K), make.scales(*rows)
    weight, columns, bias = make.int8(N, K), make.scales(N), make.float(N)
    gates = make.float(N) if gate else None
    gates16 = None if gates is None else gates.to(make.dtype)
    stream = make.half(*rows, N) if residual else None
    out = torch.empty(*rows, N, dtype=make.dtype, device=make.device)
    M = rows[0] * rows[1]

    def run() -> object:
        return launch.w8a8_linear(
            *(values, scales, weight, columns, bias, make.dtype),
            silu=silu,
            gate=gates,
            residual=stream,
            out=out,
        )

    def replaced() -> object:
        sums = torch._int_mm(values.view(-1, K), weight.t()).view(*rows, N)
        y = (sums.float() * scales.unsqueeze(-1) * columns + bias).to(make.dtype)
        y = F.silu(y) if silu else y
        y = y if gates16 is None else y * gates16
        return y if stream is None else stream + y

    moved = M * K + N * K + 2 * M * N * (2 if residual else 1)
    return Case(
        f"w8a8_linear {name}",
        f"{M}x{N}x{K}",
        sizes.config.num_layers,
        2 * M * N * K,
        moved,
        run,
        replaced,
    )


def _out(sizes: Sizes, make: _Tensors) -> Case:
    C = sizes.config.dim
    return _linear(sizes, make, "out", (sizes.images, sizes.tokens), C, C, gate=True, residual=True)


def _cross_q(sizes: Sizes, make: _Tensors) -> Case:
    return _linear(
        sizes, make, "cross_q", (sizes.prompted, sizes.tokens), _inner(sizes.config), sizes.config.dim
    )


def _cross_out(sizes: Sizes, make: _Tensors) -> Case:
    rows = (sizes.prompted, sizes.tokens)
    return _linear(sizes, make, "cross_out", rows, sizes.config.dim, _inner(sizes.config), residual=True)


def _expand(sizes: Sizes, make: _Tensors) -> Case:
    config = sizes.config
    rows = (sizes.images, sizes.tokens)
    return _linear(sizes, make, "expand", rows, 2 * config.ffn_dim, config.dim, silu=True)


def _project(sizes: Sizes, make: _Tensors) -> Case:
    config, rows = sizes.config, (sizes.images, sizes.tokens)
    return _linear(sizes, make, "project", rows, config.dim, config.ffn_dim, gate=True, residual=True)


def _cross_attention(sizes: Sizes, make: _Tensors) -> Case:
    config, R, T = sizes.config, sizes.prompted, sizes.tokens
    heads, d = config.num_cross_attention_heads, config.cross_attention_head_dim
    q, keys = make.half(R, T, heads * d), make.half(R, heads, CAPACITY, d)
    transposed = make.half(R, heads, d, CAPACITY)
    lengths = torch.full((R,), sizes.length, dtype=torch.int32, device=make.device)

    def replaced() -> object:
        found = (t[:, :, : sizes.length] for t in (keys, transposed.transpose(2, 3)))
        read = F.scaled_dot_product_attention(q.view(R, T, heads, d).transpose(1, 2), *found)
        return _quantized(read.transpose(1, 2).flatten(2))

    return Case(
        "cross_attention_quantize",
        f"{sizes.asked}x{heads * d}, {sizes.length} keys",
        config.num_layers,
        0,
        3 * sizes.asked * heads * d + 4 * R * heads * d * sizes.length,
        lambda: launch.cross_attention_quantize(q, keys, transposed, lengths),
        replaced,
    )


def _depthwise(sizes: Sizes, make: _Tensors) -> Case:
    config, h = sizes.config, sizes.config.ffn_dim
    side = sizes.side // LATENT_CELL
    x, weight, bias = (
        make.half(sizes.images, sizes.tokens, 2 * h),
        make.half(3, 3, 2 * h) / 3,
        make.float(2 * h),
    )
    kernel = weight.permute(2, 0, 1).unsqueeze(1).contiguous()
    bias16 = bias.to(make.dtype)

    def replaced() -> object:
        image = x.view(-1, side, side, 2 * h).permute(0, 3, 1, 2)
        mixed = F.conv2d(image, kernel, bias16, padding=1, groups=2 * h)
        value, gate = mixed.permute(0, 2, 3, 1).chunk(2, dim=-1)
        return _quantized(value * F.silu(gate))

    return Case(
        "dwconv_glu_quantize",
        f"{sizes.rows}x{2 * h}",
        config.num_layers,
        0,
        5 * sizes.rows * h,
        lambda: launch.dwconv_glu_quantize(x, weight, bias, side, side),
        replaced,
    )


def _patch(sizes: Sizes, make: _Tensors) -> Case:
    config, side = sizes.config, sizes.side // LATENT_CELL
    copies = sizes.images // sizes.prompted
    latent = make.float(sizes.prompted, config.in_channels, side, side)
    weight, bias = make.float(config.in_channels, config.dim), make.float(config.dim)
    return Case(
        "patch_embed",
        f"{sizes.rows}x{config.dim}",
        1,
        0,
        latent.numel() * 4 + weight.numel() * 4 + 2 * sizes.rows * config.dim,
        lambda: launch.patch_embed(latent, weight, bias, None, copies, make.dtype),
    )


def _head(sizes: Sizes, make: _Tensors) -> Case:
    config, side = sizes.config, sizes.side // LATENT_CELL
    x = make.half(sizes.images, sizes.tokens, config.dim)
    scale, shift = make.float(config.dim), make.float(config.dim)
    weight, bias = make.float(config.out_channels, config.dim), make.float(config.out_channels)
    guidance = torch.tensor(4.5, device=make.device) if sizes.images > sizes.prompted else None
    return Case(
        "velocity_head",
        f"{sizes.rows}x{config.dim}",
        1,
        0,
        2 * x.numel() + weight.numel() * 4 + 4 * sizes.asked * config.out_channels,
        lambda: launch.velocity_head(x, scale, shift, EPS, weight, bias, guidance, (side, side)),
    )


def _inner(config: DenoiserConfig) -> int:
    return config.num_cross_attention_heads * config.cross_attention_head_dim


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a runtime without fused kernels does to rows."""
    scales = x.abs().amax(-1, keepdim=True).float() / 127
    return (x / scales).round().to(torch.int8), scales
