"""Products of INT8 matrices with exact sums.

torch._int_mm where it works and is fast. Without AVX-512, as in most laptops, it multiplies one number at a
time: there oneDNN's quantized linear layer, which torch keeps for its own compiler, if the CPU has AVX-VNNI.
Products in fp32 elsewhere. All of them give the same sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# rows of a weight that are turned into columns at a time
_HELD_ROWS = 64
# the uint8 that stands for 0
_ZERO = 128
# Products of int8 with a row of a weight add up exactly in fp32, in any order, where the row's absolute
# values are at most so much together: 128 times that is 2^24. With 1024 in depth any are.
_EXACT_ROW = 1 << 17
_EXACT_DEPTH = 1024


def hold_weight(weight: Tensor) -> Tensor:
    """The same int8 weight (out, in), in the memory order that `w8a8_linear` reads fastest on its device."""
    if weight.device.type != "cpu" or _packs():
        # cuBLASLt wants both factors with the inner dimension contiguous, and so does oneDNN's packing
        return weight.contiguous()
    if weight.t().is_contiguous():
        return weight
    held = weight.new_empty(weight.shape[::-1]).t()
    # in blocks whose lines stay in the cache
    for start in range(0, len(weight), _HELD_ROWS):
        held[start : start + _HELD_ROWS] = weight[start : start + _HELD_ROWS]
    return held


def multiplier(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What multiplies int8 values (M, K) by an int8 weight (N, K) transposed: exact sums (M, N), as fp32."""
    if weight.device.type == "cpu" and _packs():
        return _packed(weight)
    if weight.device.type == "cpu" and int8_refusal("cpu"):
        return _wide(weight)
    return lambda values: int8_sums(values, weight).float()


def describe(device: str) -> tuple[bool, str]:
    """Whether a kind of device multiplies INT8 as such, and with what or why not."""
    refusal = int8_refusal(device)
    if not refusal:
        return True, f"torch._int_mm on {device}"
    packed = onednn_linear_refusal() if device == "cpu" else "oneDNN is for CPUs"
    if not packed:
        return True, f"oneDNN on {device}, because: {refusal}"
    return False, f"{device} multiplies in fp32, because: {refusal}"


def int8_sums(values: Tensor, weight: Tensor) -> Tensor:
    """Products of int8 values (M, K) and weight (N, K) transposed, summed exactly: (M, N) int32."""
    refused = int8_refusal(values.device.type) or _shape_refusal(values, weight)
    if not refused:
        return torch._int_mm(values, weight.t())
    return _wide(weight)(values, torch.int32)


def exact_parts(weight: Tensor) -> list[slice]:
    """Parts of the depth of a weight (N, K, ...), integers in fp32, whose products with int8 are exact there.

    All parts but the last are of the same depth; most weights need one.
    """
    depth, each = weight.shape[1], weight[0, :1].numel()
    if depth * each <= _EXACT_DEPTH:
        return [slice(0, depth)]
    sizes = weight.abs().flatten(2).sum(2) if weight.ndim > 2 else weight.abs()
    step = depth
    while step > 1 and max(float(part.sum(1).max()) for part in torch.split(sizes, step, 1)) > _EXACT_ROW:
        step = -(-step // 2)
    return [slice(start, start + step) for start in range(0, depth, step)]


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


@functools.cache
def onednn_linear_refusal() -> str:
    """Why oneDNN's quantized linear layer cannot be used on this CPU; empty where it can."""
    generator = torch.Generator().manual_seed(0)
    # (7, K) and (33, K): sums beyond 2^24, products that saturate 16 bit in pairs, and both signs
    values = torch.randint(-127, 128, (7, 1500), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (33, 1500), dtype=torch.int8, generator=generator)
    values[:2], weight[:2], weight[2:4] = 127, 127, -127
    try:
        sums = _packed(weight)(values)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"torch {torch.__version__} cannot: {str(error).partition(chr(10))[0]}"
    exact = values.long() @ weight.long().T
    return "" if torch.equal(sums, exact.float()) else "its sums saturate on this CPU"


def _packs() -> bool:
    """Whether this CPU's products are oneDNN's linear layer."""
    return bool(int8_refusal("cpu")) and not onednn_linear_refusal()


def _packed(weight: Tensor) -> Callable[[Tensor], Tensor]:
    columns = len(weight)
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    scales, zeros = torch.ones(columns), torch.zeros(columns, dtype=torch.int32)

    def multiply(values: Tensor) -> Tensor:
        # q + 128, modulo 256; int8 itself would be multiplied one number at a time
        shifted = values.contiguous().view(torch.uint8).bitwise_xor(_ZERO)
        sums: Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, _ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return sums

    return multiply


def _wide(weight: Tensor) -> Callable[..., Tensor]:
    """Products in fp32, of parts of the depth whose sums are exact there."""
    wide = weight.float()
    parts = exact_parts(wide)

    def multiply(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if len(parts) == 1:
            return (values.float() @ wide.T).to(dtype)
        sums = torch.zeros(len(values), len(wide), dtype=torch.int32, device=values.device)
        for depth in parts:
            sums += (values[:, depth].float() @ wide[:, depth].T).to(torch.int32)
        return sums.to(dtype)

    return multiply


def _shape_refusal(values: Tensor, weight: Tensor) -> str:
    if values.device.type == "cpu":
        return ""
    (M, K), N = values.shape, len(weight)
    return "" if M > 16 and K % 8 == 0 and N % 8 == 0 else f"cuBLASLt has no INT8 product of {M}x{K}x{N}"
