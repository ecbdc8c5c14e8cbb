"""What the wrappers of csrc/ check of tensors, since the library sees pointers only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sana_edge.errors import InvalidInput


def suits(
    name: str, tensor: Tensor, shape: Sequence[int], dtypes: torch.dtype | Sequence[torch.dtype]
) -> None:
    """Refuses a tensor of another shape or type, or with gaps.

    Raises:
        InvalidInput: it is one.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tuple(tensor.shape) == tuple(shape) and tensor.dtype in allowed and tensor.is_contiguous():
        return
    found = f"{tuple(tensor.shape)} {tensor.dtype}{'' if tensor.is_contiguous() else ' with gaps'}"
    kinds = " or ".join(str(dtype) for dtype in allowed)
    raise InvalidInput(f"{name}: {found}, not {tuple(shape)} {kinds}", "give a contiguous one of that shape")


def per_image(name: str, vectors: Tensor, images: int, columns: int) -> int:
    """Floats from an image's vector to the next one's, of fp32 (C,) or (B, 1, C); 0 where all share one.

    Raises:
        InvalidInput: vectors have another shape or type, or gaps within one.
    """
    shared = vectors.shape == (columns,) or vectors.shape == (1, 1, columns)
    fits = shared or vectors.shape == (images, 1, columns)
    if not fits or vectors.dtype != torch.float32 or (columns > 1 and vectors.stride(-1) != 1):
        raise InvalidInput(
            f"{name}: {tuple(vectors.shape)} {vectors.dtype} with strides {vectors.stride()}, "
            f"not ({columns},) or ({images}, 1, {columns}) torch.float32 without gaps",
            "give one vector for all images, or one for each",
        )
    return 0 if shared else vectors.stride(0)


def same_stride(scale: Tensor, shift: Tensor, images: int, columns: int) -> int:
    """`per_image` of two vectors that must have one stride.

    Raises:
        InvalidInput: they differ, or one of them is refused.
    """
    strides = [per_image(n, t, images, columns) for n, t in (("scale", scale), ("shift", shift))]
    if strides[0] != strides[1]:
        raise InvalidInput(
            f"scale and shift: {strides[0]} and {strides[1]} floats from an image to the next",
            "take both from one table, or make both contiguous",
        )
    return strides[0]
