"""The denoiser's first and last operation of csrc/, by the names of `reference_fused`."""

from __future__ import annotations

import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.cuda import library
from sana_edge.kernels.cuda.checks import same_stride, suits
from sana_edge.kernels.cuda.library import TYPES

_HALVES = (torch.float16, torch.bfloat16)


def patch_embed(
    latent: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor | None,
    copies: int,
    dtype: torch.dtype,
) -> Tensor:
    """`reference_fused.patch_embed` to fp16 or bf16, all else contiguous fp32; C is a multiple of 8."""
    if latent.ndim != 4 or weight.ndim != 2 or dtype not in _HALVES:
        raise InvalidInput(
            f"latent {tuple(latent.shape)}, weight {tuple(weight.shape)}, {dtype}: "
            "not (images, channels, height, width), (channels, columns) and 16 bits",
            "see reference_fused.patch_embed",
        )
    images, channels, height, width = latent.shape
    columns = weight.shape[1]
    suits("latent", latent, latent.shape, torch.float32)
    suits("weight", weight, (channels, columns), torch.float32)
    suits("bias", bias, (columns,), torch.float32)
    if positions is not None:
        suits("positions", positions, (height * width, columns), torch.float32)
    out = torch.empty((copies * images, height * width, columns), dtype=dtype, device=latent.device)
    library.load().call(
        "patch_embed",
        latent.device,
        latent=latent,
        weight=weight,
        bias=bias,
        positions=positions,
        out=out,
        images=images,
        copies=copies,
        channels=channels,
        height=height,
        width=width,
        columns=columns,
        type=TYPES[dtype],
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
    """`reference_fused.velocity_head` of contiguous fp16 or bf16 x, all else fp32.

    Scale and shift are (C,) or (B, 1, C), parts of one table or alike: of the same stride.
    """
    if x.ndim != 3 or weight.ndim != 2 or (guidance is not None and len(x) % 2):
        raise InvalidInput(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}: not (images, tokens, columns), "
            "of two halves with guidance, and (channels, columns)",
            "see reference_fused.velocity_head",
        )
    rows, _, columns = x.shape
    channels = len(weight)
    height, width = size
    suits("x", x, (rows, height * width, columns), _HALVES)
    suits("weight", weight, (channels, columns), torch.float32)
    suits("bias", bias, (channels,), torch.float32)
    if guidance is not None:
        suits("guidance", guidance, (), torch.float32)
    images = rows if guidance is None else rows // 2
    out = torch.empty((images, channels, height, width), dtype=torch.float32, device=x.device)
    library.load().call(
        "velocity_head",
        x.device,
        x=x,
        scale=scale,
        shift=shift,
        weight=weight,
        bias=bias,
        guidance=guidance,
        out=out,
        stride=same_stride(scale, shift, rows, columns),
        images=images,
        tokens=height * width,
        columns=columns,
        channels=channels,
        eps=eps,
        type=TYPES[x.dtype],
    )
    return out
