"""Linear layers with INT8 weights whose activations keep their precision, for the text encoder.

A prompt has some 30 tokens, so that reading the weights is most of the work. Activations are split into two
INT8 digits, x ≈ scale · (high + low / 254), where ``low`` is what rounding to ``high`` left over; one exact
integer product multiplies both by the weight. A value's error is at most absmax / 64516, so a row's is in L2
at most √in / 64516 of it: below the 2^-8 that rounding to bf16 may cost for up to 63504 inputs.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_edge.errors import DamagedWeights
from sana_edge.int8 import ops, quant
from sana_edge.int8.linear import Move, keeping_dtype

# values of `low` for one of `high`: half a step, ±1/2, becomes ±127
_LOW = 2 * quant.QMAX

# of what is computed at a time on a CPU, so that it stays in the second-level cache
_PIECE_BYTES = 1 << 20

# cuBLASLt multiplies no fewer than 17 rows; a token is two
_GPU_TOKENS = 9

# columns of activations with larger values stay in 16 bit in bitsandbytes; the paper's (arXiv 2208.07339) and
# its own default for language models
_OUTLIER = 6.0


@dataclass(frozen=True)
class Product:
    """How a device multiplies by INT8 weights, and why, as a phrase for people."""

    name: Literal["digits", "dequantized", "bitsandbytes"]
    reason: str


class WeightOnlyLinear(nn.Module):
    """A linear layer with weight int8 (out, in), weight_scale fp32 (out,) and maybe bias (out,).

    All three keep their dtypes in `Module.to`.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in the dtype of x."""
        dequantized = choose_product(x.device.type).name == "dequantized"
        multiply = multiply_dequantized if dequantized else multiply_digits
        out = multiply(x.flatten(0, -2), self.weight, self.weight_scale, self.bias)
        return out.view(*x.shape[:-1], len(self.weight))

    def extra_repr(self) -> str:
        """For print(model)."""
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Move, recurse: bool = True) -> WeightOnlyLinear:
        super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self


def quantize_weight(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """`quant.quantize_weight`, checked.

    Raises:
        CheckpointError: NaN or infinite values; names the layer.
    """
    values, scales = quant.quantize_weight(weight)
    if not scales.isfinite().all():
        raise DamagedWeights(
            f"{name}.weight has NaN or infinite values",
            "the file is damaged; download the model again",
        )
    return values, scales


def split_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M, in) as two INT8 digits and the value of the low one.

    Returns:
        (2M, in) int8, all high digits before all low ones, and steps (M, 1) fp32:
        x ≈ step · (254 · high + low). The steps of a row with NaN or infinite values are not finite.
    """
    x = x.float()
    scales = quant.row_scales(x).unsqueeze(-1)
    high = quant.quantize(x, scales)
    rest = x * scales.reciprocal() - high
    low = quant.quantize(rest, rest.new_tensor(1 / _LOW))
    return torch.cat([high, low]), scales / _LOW


def multiply_digits(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, in) times weight (out, in) transposed by `split_digits`, whose sums are exact.

    Returns:
        (M, out) in the dtype of x, fp32 until then.
    """
    digits, steps = split_digits(_padded(x))
    out = x.new_empty(len(steps), len(weight))
    for columns in _pieces(weight, 4 * len(digits)):
        high, low = ops.int8_sums(digits, weight[columns]).float().chunk(2)
        products = low.add_(high, alpha=_LOW).mul_(steps).mul_(weight_scale[columns])
        out[:, columns] = products if bias is None else products.add_(bias[columns].float())
    return out[: len(x)]


def _padded(x: Tensor) -> Tensor:
    missing = 0 if x.device.type == "cpu" else _GPU_TOKENS - len(x)
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x


def multiply_dequantized(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x (M, in) times weight (out, in) transposed, dequantized to the dtype of x; (M, out)."""
    out = x.new_empty(len(x), len(weight))
    for rows in _pieces(weight, x.element_size() * x.shape[1]):
        piece = quant.dequantize_weight(weight[rows], weight_scale[rows], x.dtype)
        out[:, rows] = F.linear(x, piece, None if bias is None else bias[rows].to(x.dtype))
    return out


def _pieces(rows: Tensor, row_bytes: int) -> Iterator[slice]:
    """Slices of rows whose copies, of so many bytes a row, stay in a CPU's cache; all of them elsewhere."""
    step = max(_PIECE_BYTES // row_bytes, 1) if rows.device.type == "cpu" else max(len(rows), 1)
    return (slice(start, start + step) for start in range(0, len(rows), step))


@functools.cache
def choose_product(device: str) -> Product:
    """How a kind of device ("cpu", "cuda") multiplies by INT8 weights.

    bitsandbytes is chosen by installing it. Nothing of this has run on a GPU yet.
    """
    if device == "cuda" and not bitsandbytes_refusal(device):
        return Product("bitsandbytes", "bitsandbytes is installed: LLM.int8(), activations in INT8 too")
    refusal = ops.int8_refusal(device)
    if refusal:
        return Product("dequantized", refusal)
    return Product("digits", "torch._int_mm, activations in two INT8 digits")


@functools.cache
def bitsandbytes_refusal(device: str) -> str:
    """Why bitsandbytes cannot be used on a kind of device; empty where a small layer gives what it should."""
    weight = torch.arange(64 * 64, device=device).view(64, 64).remainder(255).sub(127).to(torch.int8)
    layer = WeightOnlyLinear(weight, torch.full((64,), 1 / quant.QMAX, device=device))
    x = torch.linspace(-1, 1, 32 * 64, device=device, dtype=torch.bfloat16).view(32, 64)
    try:
        importlib.import_module("bitsandbytes")
        product = to_bitsandbytes(layer)(x).float()
    except ModuleNotFoundError:
        return "bitsandbytes is not installed: pip install 'sana-edge[int8-cuda]'"
    # its libraries do not load, or are not made for this device
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"bitsandbytes does not run: {str(error).partition(chr(10))[0]}"
    expected = multiply_dequantized(x.float(), layer.weight, layer.weight_scale)
    # INT8 rows and a bf16 result: about 1 %
    return "" if quant.relative_error(product, expected) < 0.05 else "bitsandbytes gives wrong products"


def to_bitsandbytes(layer: WeightOnlyLinear) -> nn.Module:
    """The same layer as bitsandbytes' Linear8bitLt, without quantizing again: it shares the INT8 weight.

    Its scheme is ours, with 127 times the scale stored. Activations become INT8 too, but for outlier columns
    (arXiv 2208.07339), which is less exact than the digits. The layer must be on its final device.
    """
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    # it says at every product that it casts to fp16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    out_features, in_features = layer.weight.shape
    linear: nn.Module = Linear8bitLt(
        in_features, out_features, bias=False, has_fp16_weights=False, threshold=_OUTLIER, device="meta"
    )
    scales = layer.weight_scale * quant.QMAX
    linear.weight = Int8Params(layer.weight, requires_grad=False, CB=layer.weight, SCB=scales)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias, requires_grad=False)
    return linear.eval()
