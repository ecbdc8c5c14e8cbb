"""What launchers of Triton kernels check of tensors: device, shape, dtype, layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from sana_edge.errors import InvalidInput, UnsupportedDevice

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# columns of a row that a program holds, see int8_tile.py
WIDEST = 16384


def check_kernel(op: str, kernel: object, x: Tensor) -> None:
    """That x is where a kernel can run.

    Raises:
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    if x.device.type != "cuda" and isinstance(kernel, triton.JITFunction):
        raise UnsupportedDevice(
            f"the Triton kernel {op} runs on CUDA devices, not on {x.device.type}", "use the torch backend"
        )


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    like: Tensor,
    *shapes: tuple[int, ...],
    dtypes: Sequence[torch.dtype] = FLOATS,
    spaced: bool = False,
) -> None:
    """That a tensor has one of the shapes and dtypes, is where ``like`` is, and contiguous.

    ``spaced``: that its last dimension is, is enough.

    Raises:
        InvalidInput: anything else.
    """
    shape = tuple(tensor.shape)
    dense = tensor.is_contiguous() or (spaced and (shape[-1:] == (1,) or tensor.stride()[-1:] == (1,)))
    if shape in shapes and tensor.dtype in dtypes and tensor.device == like.device and dense:
        return
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise InvalidInput(
        f"{name} of {op} is {tensor.dtype} {shape} on {tensor.device}{'' if dense else ', not contiguous'}",
        f"give {' or '.join(map(str, shapes))} {kinds} on {like.device}, contiguous",
    )


def check_vector(op: str, name: str, vector: Tensor, x: Tensor) -> int:
    """That a vector is (C,) or (B, 1, C) for x (B, N, C); its stride along B, 0 of one for all images.

    Raises:
        InvalidInput: anything else.
    """
    B, _, C = x.shape
    check_tensor(op, name, vector, x, (C,), (1, 1, C), (B, 1, C), spaced=True)
    return vector.stride(0) if vector.ndim == 3 and len(vector) > 1 else 0


def check_rows(op: str, kernel: object, x: Tensor) -> None:
    """That a kernel that holds whole rows can read x (..., C).

    Raises:
        InvalidInput: another dtype than `FLOATS`, no or too many columns, or gaps in memory.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    check_kernel(op, kernel, x)
    if x.ndim < 1 or not 1 <= x.shape[-1] <= WIDEST:
        raise InvalidInput(
            f"x of {op} has shape {tuple(x.shape)}", f"give (..., C), C from 1 to {WIDEST}, or use torch"
        )
    check_tensor(op, "x", x, x, tuple(x.shape))


def check_static_scale(op: str, static_scale: Tensor | None, x: Tensor) -> None:
    """That ``static_scale`` is None, or () fp32 where x is.

    Raises:
        InvalidInput: anything else.
    """
    if static_scale is not None:
        check_tensor(op, "static_scale", static_scale, x, (), dtypes=(torch.float32,))


def empty_rows(x: Tensor, columns: int | None = None) -> tuple[Tensor, Tensor]:
    """For x (..., C): values (..., columns) int8, C if left out, and scales (...,) fp32, to be filled."""
    width = x.shape[-1] if columns is None else columns
    values = torch.empty(*x.shape[:-1], width, dtype=torch.int8, device=x.device)
    return values, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
