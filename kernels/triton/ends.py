"""The denoiser's first and last layers in Triton, by the names of `reference_fused`."""

# what comes from triton has no types
# mypy: allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.triton.ends_kernels import patch_embed_kernel, velocity_head_kernel
from sana_edge.kernels.triton.int8_tile import FLOATS, check_kernel

# Tokens and channels of a program; the latent's channels, 32 in SANA, are multiplied in one piece. Few tokens
# of the last layer, so that one picture fills the SMs. Reasoned and compiled, not measured.
FIRST = (32, 64)
LAST = (16, 64)
MOST_CHANNELS = 64


def patch_embed(
    latent: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor | None,
    copies: int,
    dtype: torch.dtype,
) -> Tensor:
    """`reference_fused.patch_embed`.

    Args:
        latent: (B, channels, H, W), contiguous, up to 64 channels; float, as are all.
        weight: (channels, C), contiguous.
        bias: (C,).
        positions: (H · W, C), contiguous, or None.
        dtype: of the result, fp32, fp16 or bf16.

    Raises:
        InvalidInput: types, shapes, devices or memory layouts other than these.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    op = "patch_embed"
    check_kernel(op, patch_embed_kernel, latent)
    if latent.ndim != 4 or weight.ndim != 2 or not 1 <= latent.shape[1] <= MOST_CHANNELS:
        raise InvalidInput(
            f"latent of {op} has shape {tuple(latent.shape)}, weight {tuple(weight.shape)}",
            f"give (B, channels, H, W) and (channels, C), up to {MOST_CHANNELS} channels",
        )
    if dtype not in FLOATS or copies < 1:
        raise InvalidInput(
            f"{op} cannot give {copies} copies of {dtype}", "ask for one or more in a float dtype"
        )
    B, channels, H, W = latent.shape
    C = weight.shape[1]
    _check(op, latent, "latent", latent, tuple(latent.shape))
    _check(op, latent, "weight", weight, (channels, C))
    _check(op, latent, "bias", bias, (C,))
    if positions is not None:
        _check(op, latent, "positions", positions, (H * W, C))
    out = torch.empty(copies * B, H * W, C, dtype=dtype, device=latent.device)
    if not out.numel():
        return out
    with torch.cuda.device_of(latent):
        patch_embed_kernel[(triton.cdiv(H * W, FIRST[0]), triton.cdiv(C, FIRST[1]), B)](
            *(latent, weight, bias, positions, out, B, H * W),
            CHANNELS=channels,
            DEPTH=_padded(channels),
            C=C,
            COPIES=copies,
            BLOCK_N=FIRST[0],
            BLOCK_C=FIRST[1],
        )
    return out


def velocity_head(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    guidance: Tensor | None,
    size: tuple[int, int],
) -> Tensor:
    """`reference_fused.velocity_head`.

    Args:
        x: (B, H · W, C), contiguous, the unguided images first where there is a guidance; float, as are all.
        scale, shift: (C,) or (B, 1, C), of any stride along B.
        weight: (channels, C), contiguous, up to 64 channels.
        bias: (channels,).
        guidance: () fp32, or None.
        size: H and W.

    Returns:
        (B, channels, H, W) fp32, of half as many images with guidance.

    Raises:
        InvalidInput: types, shapes, devices or memory layouts other than these.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    op = "velocity_head"
    check_kernel(op, velocity_head_kernel, x)
    if x.ndim != 3 or x.shape[1] != size[0] * size[1] or (guidance is not None and len(x) % 2):
        raise InvalidInput(
            f"x of {op} has shape {tuple(x.shape)} for {size}", "give (B, H · W, C), B even if guided"
        )
    if weight.ndim != 2 or not 1 <= len(weight) <= MOST_CHANNELS:
        raise InvalidInput(
            f"weight of {op} has shape {tuple(weight.shape)}",
            f"give (channels, C), up to {MOST_CHANNELS} channels",
        )
    B, N, C = x.shape
    _check(op, x, "x", x, (B, N, C))
    _check(op, x, "weight", weight, (len(weight), C))
    _check(op, x, "bias", bias, (len(weight),))
    strides = [_check_vector(op, x, name, vector) for name, vector in (("scale", scale), ("shift", shift))]
    if guidance is not None:
        _check(op, x, "guidance", guidance, ())
    images = B if guidance is None else B // 2
    out = torch.empty(images, len(weight), *size, dtype=torch.float32, device=x.device)
    if not out.numel():
        return out
    with torch.cuda.device_of(x):
        velocity_head_kernel[(triton.cdiv(N, LAST[0]), images)](
            *(x, scale, shift, weight, bias, guidance, out, images, N, *strides, eps),
            C=C,
            CHANNELS=len(weight),
            WIDTH=_padded(len(weight)),
            BLOCK_N=LAST[0],
            BLOCK_C=LAST[1],
        )
    return out


def _padded(channels: int) -> int:
    """What tensor cores multiply."""
    return max(int(triton.next_power_of_2(channels)), 16)


def _check_vector(op: str, x: Tensor, name: str, vector: Tensor) -> int:
    """The distance of one image's vector to the next, 0 where all share it."""
    B, _, C = x.shape
    if vector.ndim != 3:
        _check(op, x, name, vector, (C,))
        return 0
    _check(op, x, name, vector[0, 0], (C,))
    if tuple(vector.shape[:2]) not in ((1, 1), (B, 1)):
        raise InvalidInput(f"{name} of {op} has shape {tuple(vector.shape)}", f"give ({C},) or ({B}, 1, {C})")
    stride: int = vector.stride(0)
    return stride if len(vector) > 1 else 0


def _check(op: str, x: Tensor, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in FLOATS:
        raise InvalidInput(f"{name} of {op} is {tensor.dtype}", "give float32, bfloat16 or float16")
    if tensor.device != x.device:
        raise InvalidInput(f"{name} is on {tensor.device}, another on {x.device}", "move one of them")
    if tuple(tensor.shape) != shape:
        raise InvalidInput(f"{name} of {op} has shape {tuple(tensor.shape)}", f"give {shape}")
    if not tensor.is_contiguous():
        raise InvalidInput(f"{name} of {op} is not contiguous", f"call {name}.contiguous()")
