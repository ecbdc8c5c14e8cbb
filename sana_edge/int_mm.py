"""Products of INT8 matrices with exact sums: torch._int_mm where it works, fp32 products elsewhere."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# rows of a weight that are turned into columns at a time
_HELD_ROWS = 64
# so many products of two int8 add up exactly in fp32: 1024 · 128 · 127 < 2^24
_EXACT_DEPTH = 1024


def hold_weight(weight: Tensor) -> Tensor:
    """The same int8 weight (out, in), in the memory order that `w8a8_linear` reads fastest on its device."""
    if weight.device.type != "cpu":
        # cuBLASLt wants both factors with the inner dimension contiguous
        return weight.contiguous()
    if weight.t().is_contiguous():
        return weight
    held = weight.new_empty(weight.shape[::-1]).t()
    # in blocks whose lines stay in the cache
    for start in range(0, len(weight), _HELD_ROWS):
        held[start : start + _HELD_ROWS] = weight[start : start + _HELD_ROWS]
    return held


def int8_sums(values: Tensor, weight: Tensor) -> Tensor:
    """Products of int8 values (M, K) and weight (N, K) transposed, summed exactly: (M, N) int32."""
    refused = int8_refusal(values.device.type) or _shape_refusal(values, weight)
    if not refused:
        return torch._int_mm(values, weight.t())
    sums = torch.zeros(len(values), len(weight), dtype=torch.int32, device=values.device)
    for start in range(0, values.shape[1], _EXACT_DEPTH):
        depth = slice(start, start + _EXACT_DEPTH)
        sums += (values[:, depth].float() @ weight[:, depth].float().T).to(torch.int32)
    return sums


def int8_refusal(device: str) -> str:
    """Why torch._int_mm is not used on a kind of device ("cpu", "cuda"); empty where it is."""
    refusal = trial(device)
    if not refusal and device == "cpu" and not getattr(torch.cpu, "_is_vnni_supported", bool)():
        return "torch multiplies INT8 one number at a time on a CPU without AVX512-VNNI"
    return refusal


@functools.cache
def trial(device: str) -> str:
    """What went wrong when torch._int_mm was tried on a kind of device; empty where nothing did."""
    # (32, 32), over the whole range
    values = torch.arange(-512, 512, device=device).view(32, 32).remainder(255).sub(127).to(torch.int8)
    try:
        sums = torch._int_mm(values, values.t())
    except (AttributeError, RuntimeError) as error:
        return str(error).partition("\n")[0]
    wide = values.cpu().long()
    return "" if torch.equal(sums.cpu().long(), wide @ wide.T) else "torch._int_mm gives wrong sums"


def _shape_refusal(values: Tensor, weight: Tensor) -> str:
    if values.device.type == "cpu":
        return ""
    (M, K), N = values.shape, len(weight)
    return "" if M > 16 and K % 8 == 0 and N % 8 == 0 else f"cuBLASLt has no INT8 product of {M}x{K}x{N}"
