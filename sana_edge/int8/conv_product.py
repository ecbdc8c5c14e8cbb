"""The parts of INT8 convolution: quantizing maps, weights in a quick memory order, oneDNN's product.

`ops.w8a8_conv2d` puts them together. oneDNN is reached by operators that torch keeps for its own compiler:
where they are missing, or a trial shows that their sums saturate (CPUs without VNNI add pairs of products in
16 bit), a convolution in fp32 of parts of the channels, whose sums are exact there. On other devices, and
where another trial shows that such a convolution is not exact (Winograd's is not), maps are unfolded into the
rows of a linear layer. The sums are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.int8 import quant
from sana_edge.int8.matmul import exact_parts

# of the unfolded map, alive at a time: within a CPU's cache, enough to fill a GPU
_UNFOLDED_BYTES = 8 << 20
_UNFOLDED_BYTES_ON_GPU = 64 << 20
# input and output of a strip that is convolved in fp32
_WIDE_BYTES = 16 << 20
# of a piece that is quantized, in fp32, on a CPU
_QUANTIZED_BYTES = 1 << 19

# the uint8 that stands for 0
_ZERO = 128


def quantize_map(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A map with one scale: values int8 (B, C, H, W) in channels-last memory, scale () fp32.

    Args:
        x: (B, C, H, W).
        scale: calibrated, () fp32; None takes it from the absmax of x. What lies beyond is clipped. The scale
            that comes back is NaN where x has NaN or infinity, and so is all that is computed with it.
    """
    # (B, H, W, C), the order in memory: reductions are slow in any other
    image = x.detach().permute(0, 2, 3, 1)
    if scale is None:
        scale = quant.tensor_scale(image)
    else:
        scale = scale + image.sum(dtype=torch.float32) * 0
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    values = torch.empty(image.shape, dtype=torch.int8, device=x.device)
    rows, out = image.flatten(0, 2), values.flatten(0, 2)
    step = max(_QUANTIZED_BYTES // (4 * x.shape[1]), 1) if x.device.type == "cpu" else max(len(rows), 1)
    for start in range(0, len(rows), step):
        out[start : start + step] = quant.quantize(rows[start : start + step], scale)
    return values.permute(0, 3, 1, 2), scale


def pack_conv2d(weight: Tensor, padding: int) -> Tensor:
    """An int8 weight (out, in, kh, kw) in the memory order that convolutions with it are fastest in.

    Shape and dtype stay, and the size nearly; `unpack_conv2d` undoes it exactly.
    """
    if is_packed(weight):
        return weight
    if weight.device.type != "cpu":
        return weight.contiguous(memory_format=torch.channels_last)
    if not wide_refusal():
        return weight.contiguous(memory_format=torch.channels_last)
    if onednn_refusal():
        # (kh, kw, in, out) in memory
        return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    return _prepack(weight.contiguous(), padding)


def unpack_conv2d(weight: Tensor) -> Tensor:
    """Undo `pack_conv2d`; other weights come back as they are."""
    return weight.to_dense() if is_packed(weight) else weight


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is in oneDNN's own order, which only `onednn_conv2d` can read."""
    return bool(weight.layout == torch._mkldnn)  # type: ignore[attr-defined]  # missing in torch's stubs


@functools.cache
def onednn_refusal() -> str:
    """Why oneDNN's INT8 convolution is not used on this CPU; empty where it is."""
    # the largest products there are, of both signs
    values = torch.full((1, 64, 2, 3), quant.QMAX, dtype=torch.int8)
    signs = torch.tensor([quant.QMAX, -quant.QMAX], dtype=torch.int8)
    weight = signs[:, None, None, None].repeat(1, 64, 3, 3)
    try:
        packed, scale = _prepack(weight, padding=1), torch.ones(())
        sums = onednn_conv2d(values, scale, packed, scale.expand(2), None, 1, torch.float32)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"torch {torch.__version__} cannot: {str(error).partition(chr(10))[0]}"
    expected = F.conv2d(values.double(), weight.double(), padding=1)
    return "" if torch.equal(sums.double(), expected) else "its sums saturate on this CPU"


def _prepack(weight: Tensor, padding: int) -> Tensor:
    scales = weight.new_ones(len(weight), dtype=torch.float32)
    packed: Tensor = torch.ops.onednn.qconv_prepack(
        weight, scales, 1.0, _ZERO, [1, 1], [padding, padding], [1, 1], 1, None
    )
    return packed


def onednn_conv2d(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    """`ops.w8a8_conv2d` with a packed weight."""
    out: Tensor = torch.ops.onednn.qconv_pointwise(
        # q + 128, modulo 256
        values.view(torch.uint8).bitwise_xor(_ZERO),
        float(scale),
        _ZERO,
        weight,
        weight_scales.contiguous(),
        torch.zeros(len(weight_scales), dtype=torch.int32),
        None if bias is None else bias.float(),
        [1, 1],
        [padding, padding],
        [1, 1],
        1,
        1.0,
        0,
        dtype if dtype == torch.bfloat16 else torch.float32,
        "none",
        [],
        "",
    )
    return out.to(dtype)


@functools.cache
def wide_refusal() -> str:
    """Why INT8 maps are not convolved in fp32 on this CPU; empty where they are."""
    if not onednn_refusal():
        return "oneDNN convolves INT8"
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (1, 64, 24, 24), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (64, 64, 3, 3), dtype=torch.int8, generator=generator)
    # all of one sign reach what is still exact, nearly
    values[:, :, :4], weight[:2] = 127, 127
    one = torch.ones(())
    found = wide_conv2d(_channels_last(values), one, weight, one.expand(64), None, 1, torch.float32)
    exact = F.conv2d(values.double(), weight.double(), padding=1)
    return "" if torch.equal(found.double(), exact) else "its sums are not exact on this CPU"


def wide_conv2d(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    """`ops.w8a8_conv2d` in strips of rows, in fp32."""
    image = F.pad(values, [padding] * 4)
    height, width = (
        side - kernel + 1 for side, kernel in zip(image.shape[2:], weight.shape[2:], strict=True)
    )
    wide = _channels_last(weight.float())
    parts = exact_parts(wide)
    out = torch.empty(len(values), height, width, len(weight), dtype=dtype, device=values.device)
    out = out.permute(0, 3, 1, 2)
    columns = weight_scales[:, None, None]
    offsets = None if bias is None else bias.float()[:, None, None]
    row_bytes = 4 * len(values) * (image.shape[1] * image.shape[3] + len(weight) * width)
    step = max(_WIDE_BYTES // row_bytes, 1)
    for start in range(0, height, step):
        stop = min(start + step, height)
        strip = image[:, :, start : stop + weight.shape[2] - 1]
        products = (F.conv2d(_channels_last(strip[:, part].float()), wide[:, part]) for part in parts)
        sums = next(products)
        if len(parts) > 1:
            whole = sums.to(torch.int32)
            for product in products:
                whole += product.to(torch.int32)
            sums = whole.float()
        sums = sums.mul_(scale).mul_(columns)
        out[:, :, start:stop] = sums if offsets is None else sums.add_(offsets)
    return out


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def unfold(values: Tensor, kernel: tuple[int, int], padding: int) -> Iterator[Tensor]:
    """Yield all that the pixels of a few rows of the output are made of, (B, rows, W', kh kw in).

    Args:
        values: (B, in, H, W) int8, padded with zeros on all sides.
    """
    image = F.pad(values, [padding] * 4).permute(0, 2, 3, 1)
    height, width = (image.shape[1 + n] - kernel[n] + 1 for n in range(2))
    limit = _UNFOLDED_BYTES if values.device.type == "cpu" else _UNFOLDED_BYTES_ON_GPU
    row_bytes = len(image) * width * image.shape[3] * kernel[0] * kernel[1]
    step = max(limit // row_bytes, 1)
    for start in range(0, height, step):
        stop = min(start + step, height)
        taps = [
            image[:, start + i : stop + i, j : j + width] for i in range(kernel[0]) for j in range(kernel[1])
        ]
        yield torch.cat(taps, dim=-1)
