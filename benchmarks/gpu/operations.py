"""Every fused operation of a backend against its definition in torch, at a model's widths, twice.

What torch allocates is NaN before it is written. An operation that fails is recorded, and
the others go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.steps import Setting
from sana_edge.bench.results import write_json
from sana_edge.bench.shapes import DENOISERS
from sana_edge.errors import SanaError
from sana_edge.fused import ops

# images, and a latent whose tokens are a multiple of no tile
IMAGES = 2
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# an emulator takes its time
DTYPES = {"cuda": tuple(ROUNDING), "cpu": (torch.float16,)}
SIZES = {"cuda": (24, 41), "cpu": (3, 5)}


def compare(found: list[Tensor], wanted: list[Tensor], unit: float) -> float:
    """The largest error in shares of what is allowed; at most 1 is right, infinite where shapes differ.

    Of 16-bit and fp32 results the relative L2, allowed two roundings: one of a factor on the way, one of the
    result. Of INT8 a level, where a number lies in the middle of two; a factor rounded on the way moves a
    number at 40 levels, the mean of normal numbers, by 40 roundings of a level, and so many numbers change:
    25 % more is allowed, and one number in 1000, for the order of sums in fp32. Where two factors are
    rounded, as in cross-attention in bf16, one number in 10,000 may be two levels away, and none three.
    """
    worst = 0.0
    for result, expected in zip(found, wanted, strict=True):
        if result.shape != expected.shape or result.dtype != expected.dtype:
            return float("inf")
        if result.dtype == torch.int8 and result.ndim > 1 and result.shape[-2] == 2:
            # two digits of one number
            result, expected = (254 * t[..., 0, :].int() + t[..., 1, :].int() for t in (result, expected))
        if not result.dtype.is_floating_point:
            levels = (result.int() - expected.int()).abs()
            share = float(levels.float().mean()) / (50 * unit + 1e-3)
            far = float((levels > 1).float().mean()) / 1e-4
            error = max(share, far, float(levels.max() > 2) * 2)
        else:
            distance = (result.double() - expected.double()).norm() / expected.double().norm()
            error = float(distance) / (2 * unit)
        # NaN is the largest
        worst = error if not error <= worst else worst
    return worst


def checked(make: Maker, name: str, backend: str) -> dict[str, Any]:
    """One operation in one dtype: its error, and whether a second call gives the same bytes."""
    row: dict[str, Any] = {"operation": name, "dtype": str(make.dtype).removeprefix("torch.")}
    try:
        found = results(make, name, backend)
        again = results(make, name, backend)
        error = compare(found, results(make, name, "torch"), ROUNDING[make.dtype])
        same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    # Triton raises what it likes, and the next operation is worth a try
    except Exception as problem:
        reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
        return {**row, "passed": False, "reason": f"{type(problem).__name__}: {reason}"[:300]}
    reason = "" if error <= 1 else f"error of {error:.3g} times what is allowed"
    reason = reason or ("" if same else "a second call gives other bytes")
    return {**row, "passed": not reason, "error": round(error, 4), "same": same, "reason": reason}


def check(setting: Setting, output: Path, backend: str) -> None:
    """All operations; writes as it goes.

    Raises:
        SanaError: one is wrong.
    """
    device, shapes = torch.device(setting.device), setting.shapes
    # torch.empty gives NaN, and the definitions are in fp32
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES[device.type]:
        make = Maker(shapes, dtype, device, SIZES[device.type])
        for name, call in make.calls().items():
            if backend == "triton" and call.args[0] in ops.CUDA_ONLY:
                continue
            rows.append(checked(make, name, backend))
            print(rows[-1], flush=True)
            wrong = [row for row in rows if not row["passed"]]
            figure = f"{len(rows) - len(wrong)} of {len(rows)} right"
            figure += "".join(
                f"; {row['operation']} {row['dtype']}: {row['reason'][:80]}" for row in wrong[:2]
            )
            write_json(output, {"figure": figure, "backend": backend, "operations": rows})
    if wrong:
        raise SanaError(figure, "the first that is wrong comes first")


@dataclass(frozen=True)
class Maker:
    """Random tensors of a dtype on a device; ``size``: the latent's height and width."""

    shapes: str
    dtype: torch.dtype
    device: torch.device
    size: tuple[int, int]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def half(self, *shape: int) -> Tensor:
        return self.randn(*shape).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """0.5 to 1.5."""
        return torch.rand(shape, device=self.device) + 0.5

    def int8(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=self.device)

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

    def calls(self) -> dict[str, partial[Any]]:
        """Every operation with its arguments, some of them twice; only the backend is missing."""
        config = DENOISERS[self.shapes]
        C, heads, hidden = config.dim, config.num_attention_heads, config.ffn_dim
        height, width = self.size
        B, N = IMAGES, height * width
        x, scale = self.half(B, N, C), torch.tensor(0.03, device=self.device)
        table = self.randn(B, 2, C).unsqueeze(2).unbind(1)
        image = self.half(B, height, width, 128)
        return {
            "quantize_rows": partial(ops.quantize_rows, x),
            "norm_modulate_quantize": partial(ops.norm_modulate_quantize, x, *table, 1e-6, scale),
            "dwconv_glu_quantize": partial(
                *(ops.dwconv_glu_quantize, self.half(B, N, 2 * hidden)),
                *(self.half(3, 3, 2 * hidden) / 3, self.randn(2 * hidden), height, width),
            ),
            "w8a8_linear": partial(ops.w8a8_linear, *self.product(C, 2 * hidden), self.dtype, silu=True),
            "w8a8_linear in place": partial(
                *(ops.w8a8_linear, *self.product(hidden, C), self.dtype),
                limit=60000.0,
                gate=self.randn(C),
                constant=self.randn(B, 1, C),
                residual=x,
                out=x,
            ),
            "w8a8_linear_quantize": partial(
                *(ops.w8a8_linear_quantize, *self.product(hidden, C), self.dtype),
                residual=x,
                **dict(zip(("shift", "scale"), table, strict=True)),
                plain=(0, 1),
            ),
            "sampler_step": partial(
                *(ops.sampler_step, *self.randn(4, B, config.in_channels, height, width), self.uniform(7))
            ),
            "qkv_linear_attention": partial(
                *(ops.qkv_linear_attention, *self.product(C, 3 * C), self.dtype, heads)
            ),
            "qk_norm_linear_attention": partial(
                *(ops.qk_norm_linear_attention, self.half(B, N, 3 * C), self.uniform(C), heads, 1e-5)
            ),
            "linear_attention_finish": partial(
                *(ops.linear_attention_finish, x, self.uniform(B, heads, 33, 32), 1e-15),
                *(self.uniform(B, N, 2), self.uniform(C), scale),
            ),
            "cross_attention_quantize": partial(ops.cross_attention_quantize, *self._cross()),
            "patch_embed": partial(
                *(ops.patch_embed, self.randn(B, config.in_channels, height, width)),
                *(self.randn(config.in_channels, C) / 6, self.randn(C), self.randn(N, C), 2, self.dtype),
            ),
            "velocity_head": partial(
                *(ops.velocity_head, x, *table, 1e-6, self.randn(config.out_channels, C) / C**0.5),
                *(self.randn(config.out_channels), torch.tensor(4.5, device=self.device), (height, width)),
            ),
            "w8a8_conv2d": partial(
                *(ops.w8a8_conv2d, *self.convolution(64, 4, 32, 2, 2), self.dtype),
                upsample="phases",
                activation="silu",
                out_scale=scale,
            ),
            "w8a8_conv2d in place": partial(
                *(ops.w8a8_conv2d, *self.convolution(128, 128, 3, 3), self.dtype),
                norm_weight=self.uniform(128),
                norm_bias=self.randn(128),
                residual=image,
                out=image,
            ),
            "w8a8_conv2d with both": partial(
                *(ops.w8a8_conv2d, *self.convolution(128, 128, 3, 3), self.dtype),
                out_norm_weight=self.uniform(128),
                out_norm_bias=self.randn(128),
                next_scale=scale,
            ),
            "norm_add_quantize": partial(
                *(
                    ops.norm_add_quantize,
                    self.half(B, height, width, 1024),
                    self.half(B, height, width, 1024),
                ),
                *(self.uniform(1024), self.randn(1024), 1e-5, scale),
            ),
            "tensor_scale": partial(ops.tensor_scale, x),
            "multiscale_linear_attention": partial(
                *(ops.multiscale_linear_attention, self.half(B, N, 96 * 4)),
                *(self.randn(5, 5, 96 * 4) / 5, self.randn(96 * 4, 32) / 6, height, width),
            ),
            **self._gemma(),
        }

    def _gemma(self) -> dict[str, partial[Any]]:
        """Of Gemma-2-2B, and small on an emulator; a prompt of 30 tokens behind 263."""
        gpu = self.device.type == "cuda"
        C, hidden, heads, kv, d = (2304, 9216, 8, 4, 256) if gpu else (48, 80, 4, 2, 16)
        N, width = 30, (heads + 2 * kv) * d
        x, y = self.randn(2, 1, N, C).unbind(0)
        steps = self.uniform(1, N) / (73 * 254)
        weight = self.int8(width, C), self.uniform(width) / (73 * C**0.5)
        prefix = self.half(2, kv, 263, d).unbind(0)
        known = torch.tensor(262, dtype=torch.int32, device=self.device)
        return {
            "quantize_digits": partial(ops.quantize_digits, self.randn(1, N, 2 * hidden), True),
            "add_norm_digits": partial(ops.add_norm_digits, x, y, self.uniform(C), self.uniform(C), 1e-6),
            "w8a16_linear": partial(
                *(ops.w8a16_linear, self.int8(1, N, 2, C), steps, *weight, None),
                *(self.randn(N, d // 2, 2), (heads + kv) * d),
            ),
            "soft_capped_attention": partial(
                *(ops.soft_capped_attention, self.randn(1, N, width), *prefix, known, heads),
                *(d**-0.5, 50.0, 280),
            ),
        }

    def _cross(self) -> tuple[Any, ...]:
        config, N = DENOISERS[self.shapes], self.size[0] * self.size[1]
        heads, d = config.num_cross_attention_heads, config.cross_attention_head_dim
        keys, values = self.half(2, IMAGES, heads, 304, d).unbind(0)
        lengths = torch.tensor([7, 300], dtype=torch.int32, device=self.device)
        transposed = values.transpose(2, 3).contiguous()
        q = self.half(IMAGES, N, heads * d)
        return q, keys, transposed, lengths, self.uniform(heads * d), 1e-5


def results(make: Maker, name: str, backend: str) -> list[Tensor]:
    """What a backend computes of an operation; the same arguments every time."""
    torch.manual_seed(0)
    result = make.calls()[name](backend=backend)
    return [result] if isinstance(result, Tensor) else list(result)
