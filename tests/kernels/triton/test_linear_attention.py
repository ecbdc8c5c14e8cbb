"""Triton's ReLU linear attention and its gradient against their definition, interpreted; and compiled."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.errors import InvalidInput, UnsupportedDevice
from sana_edge.kernels import reference

EPS = 1e-15
# rows, tokens, heads, head dim: one token; less than a tile; chunks with a tail; tiles with a tail
SHAPES = [(1, 1, 1, 16), (2, 17, 3, 32), (1, 1000, 2, 32), (2, 130, 1, 64)]
# a number's distance from its neighbour, relative: half of it is lost by rounding to nearest, all of it where
# Triton's interpreter cuts bf16 off
STEPS = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# fp16's smallest number; bf16 and fp32 reach further than any value here
SMALLEST = {torch.float32: 0.0, torch.float16: 2**-24, torch.bfloat16: 0.0}
DTYPES = pytest.mark.parametrize("dtype", list(STEPS), ids=["fp32", "fp16", "bf16"])

Results = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def op(interpreted: None) -> Iterator[ModuleType]:
    """The kernels' module, while new tensors are filled with NaN."""
    module = importlib.import_module("sana_edge.kernels.triton.linear_attention")
    torch.use_deterministic_algorithms(True)
    yield module
    torch.use_deterministic_algorithms(False)


def fused(B: int, N: int, heads: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k and v as the denoiser has them, slices of one tensor; and a gradient."""
    qkv = torch.randn(B, N, 3 * heads * D).to(dtype)
    return *qkv.chunk(3, dim=-1), torch.randn(B, N, heads * D).to(dtype)


def results(
    op: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor, heads: int, eps: float = EPS
) -> Results:
    """The output and the gradients of q, k and v."""
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = op(*inputs, heads, eps)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def sizes(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, heads: int, eps: float = EPS) -> Results:
    """What the results would be if no term cancelled another: all terms' absolute values, added in fp64.

    0 where ReLU stops a gradient: nothing but 0 is right there.
    """
    # (B, heads, d, N)
    q, k, v, grad = (
        t.double().transpose(1, 2).reshape(len(t), heads, -1, t.shape[1]) for t in (q, k, v, grad)
    )
    q1, k1, v, grad = F.relu(q), F.relu(k), v.abs(), grad.abs()
    state, ones = v @ k1.transpose(2, 3), k1.sum(3, keepdim=True)
    divisor = (ones * q1).sum(2, keepdim=True) + eps
    read = state.transpose(2, 3) @ grad
    ratio = (q1 * read).sum(2, keepdim=True) / divisor
    grad_state = (grad / divisor) @ q1.transpose(2, 3)
    grad_ones = (ratio / divisor * q1).sum(3, keepdim=True)
    found = (
        state @ q1 / divisor,
        (read + ratio * ones) / divisor * (q > 0),
        (grad_state.transpose(2, 3) @ v + grad_ones) * (k > 0),
        grad_state @ k1,
    )
    out, grad_q, grad_k, grad_v = (t.flatten(1, 2).transpose(1, 2) for t in found)
    return out, grad_q, grad_k, grad_v


def check(op: ModuleType, inputs: tuple[Tensor, ...], heads: int, eps: float = EPS) -> Results:
    """Within the rounding of the definition in fp32, and of the result's own dtype.

    A sum of n terms in fp32, in any order, is off by at most n units of 2^-24 of the sum of their absolute
    values, and errors of what it is made of add to that. The longest chain, k's gradient, goes through the
    state (N terms), reading and the ratio (2 d), the divisor (N + d) twice, the state's gradient (N) and
    reading that (d): 4 N + 5 d, and fewer than 16 single operations. Definition and kernel may differ
    by twice that.
    """
    q, k, v, grad = inputs
    dtype, (N, D) = q.dtype, (q.shape[1], q.shape[2] // heads)
    actual = results(op.relu_linear_attention, q, k, v, grad, heads, eps)
    wide = [tensor.float() for tensor in inputs]
    expected = results(reference.relu_linear_attention, *wide, heads, eps)
    units = 2 * (4 * N + 5 * D + 16) * 2.0**-24
    for name, got, right, size in zip(
        ("output", "q", "k", "v"), actual, expected, sizes(*inputs, heads, eps), strict=True
    ):
        assert got.dtype == dtype and got.shape == q.shape and got.is_contiguous()
        allowed = units * size + STEPS[dtype] * (right.double().abs() + units * size) + SMALLEST[dtype]
        off = (got.double() - right.double()).abs() - allowed
        assert bool((off <= 0).all()), f"{name}: {int((off > 0).sum())} values, by up to {float(off.max())}"
    return actual


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(op: ModuleType, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = fused(*shape, dtype)
    given = [tensor.clone() for tensor in inputs]
    check(op, inputs, shape[2])
    assert all(torch.equal(*pair) for pair in zip(inputs, given, strict=True))


def test_a_missing_token_is_noticed(op: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = fused(1, 1000, 1, 32)
    attend = op.relu_linear_attention
    monkeypatch.setattr(
        op, "relu_linear_attention", lambda q, k, v, *rest: attend(q, k * last_token_off(k), v, *rest)
    )
    with pytest.raises(AssertionError, match="values, by up to"):
        check(op, inputs, 1)


def last_token_off(x: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(x[:, 1:]), torch.zeros_like(x[:, :1])], dim=1)


@DTYPES
def test_zeros_and_divisors_of_zero(op: ModuleType, dtype: torch.dtype) -> None:
    """ReLU's gradient at 0 is 0; rows whose divisor is only eps give 0, and what they meet stays finite."""
    q, k, v, grad = fused(2, 70, 3, 32, dtype)
    q[:, ::3, ::2], k[:, 1::3, 1::2], v[:, 5] = 0.0, 0.0, 0.0
    # a token without a positive query; a head without a positive key
    q[:, 2] = -q[:, 2].abs()
    k[0, :, 32:64] = -k[0, :, 32:64].abs()
    # queries that see only a key channel that no token has
    q[1, 7, 64:96], k[1, :, 70] = -1.0, -1.0
    q[1, 7, 70] = 2.0
    out, grad_q, grad_k, grad_v = check(op, (q, k, v, grad), 3)
    assert all(bool(tensor.isfinite().all()) for tensor in (out, grad_q, grad_k, grad_v))
    for zero in (out[:, 2], grad_q[:, 2], out[0, :, 32:64], grad_v[0, :, 32:64], out[1, 7, 64:96]):
        assert not zero.any()
    assert not grad_q[q <= 0].any() and not grad_k[k <= 0].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_eps(op: ModuleType) -> None:
    check(op, fused(1, 40, 1, 16), 1, eps=10.0)
    q, k, v, grad = (tensor.abs() for tensor in fused(1, 40, 1, 16))
    check(op, (q, k, v, grad), 1, eps=0.0)


def test_many_chunks(op: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(op, "MOST_CHUNKS", 3)
    check(op, fused(1, 385, 2, 16), 2)
    q = torch.empty(1, 385, 32)
    chunk, parts = op.state_parts(q, 2)
    assert chunk == 192 and parts.shape == (2, 3, 17, 16)


@pytest.mark.parametrize("tokens", [1, 256, 257, 1024, 4096, 4097, 16384])
def test_chunks_cover_the_tokens(op: ModuleType, tokens: int) -> None:
    chunk, parts = op.state_parts(torch.empty(2, tokens, 32), 1)
    chunks = parts.shape[1]
    assert (chunks - 1) * chunk < tokens <= chunks * chunk and chunks <= op.MOST_CHUNKS
    assert all(chunk % tile.summed == 0 for tile in op.TILES.values())


def test_the_same_bytes_alone_and_in_a_batch(op: ModuleType) -> None:
    inputs = fused(2, 300, 2, 32)
    together = results(op.relu_linear_attention, *inputs, 2)
    again = results(op.relu_linear_attention, *inputs, 2)
    alone = results(op.relu_linear_attention, *(tensor[1:].clone() for tensor in inputs), 2)
    for first, second, single in zip(together, again, alone, strict=True):
        assert torch.equal(first, second) and torch.equal(first[1:], single)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nan_and_infinity_stay_in_their_head(op: ModuleType) -> None:
    q, k, v, _ = fused(1, 50, 3, 16)
    q[0, 3, 0], k[0, 4, 16], v[0, 5, 40] = torch.nan, torch.nan, torch.inf
    out = op.relu_linear_attention(q, k, v, 3)
    expected = reference.relu_linear_attention(q, k, v, 3)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert not out[0, 3, :16].isfinite().any() and not out[0, :, 16:32].isfinite().all(1).any()
    assert bool(out[0, :3, :16].isfinite().all())


def test_layouts_of_the_gradient(op: ModuleType) -> None:
    """Expanded, as sum() gives it, and transposed."""
    q, k, v, _ = fused(2, 20, 2, 16)
    for grad in (torch.ones(()).expand(2, 20, 32), torch.randn(2, 32, 20).transpose(1, 2)):
        check(op, (q, k, v, grad), 2)


def test_empty(op: ModuleType) -> None:
    for shape in ((0, 5, 32), (2, 0, 32)):
        empty = torch.zeros(shape)
        for tensor in results(op.relu_linear_attention, empty, empty, empty, empty, 2):
            assert tensor.shape == shape


def test_refusals(op: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 4, 32)
    for inputs, heads, words in (
        ((x, x, x[:, :3]), 2, r"v is \(1, 3, 32\)"),
        ((x, x.half(), x), 2, "k is .* torch.float16"),
        ((x[0], x[0], x[0]), 2, r"q is \(4, 32\)"),
        ((x.double(),) * 3, 2, "q is torch.float64"),
        ((x.transpose(1, 2).contiguous().transpose(1, 2),) * 3, 2, "q's channels are 4 elements apart"),
        ((x, x, x), 4, "32 channels in 4 heads"),
        ((x, x, x), 5, "32 channels in 5 heads"),
        ((x, x, x), 0, "32 channels in 0 heads"),
    ):
        with pytest.raises(InvalidInput, match=words) as caught:
            op.relu_linear_attention(*inputs, heads)
        assert caught.value.hint
    kernel = op.linear_attention_state_kernel
    monkeypatch.setattr(
        op, "linear_attention_state_kernel", importlib.import_module("triton").JITFunction(kernel.fn)
    )
    with pytest.raises(UnsupportedDevice, match="relu_linear_attention runs on CUDA devices, not on cpu"):
        op.relu_linear_attention(x, x, x, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "kind", "D"),
    [
        *((kernel, "bf16", 32) for kernel in ("state", "sum", "read", "grad_q", "grad_kv")),
        *(
            pytest.param(kernel, kind, D, marks=pytest.mark.slow)
            for kind, D in (("fp32", 32), ("bf16", 16))
            for kernel in ("state", "read", "grad_q", "grad_kv")
        ),
    ],
)
def test_compiles(
    op: ModuleType, compiled: Callable[..., dict[str, str]], kernel: str, kind: str, D: int
) -> None:
    tile = op.TILES[D]
    names = getattr(op, f"linear_attention_{kernel}_kernel").arg_names
    summed = kernel in ("state", "grad_q")
    values: dict[str, object] = {
        "D": D,
        "BLOCK_N": tile.summed if summed else tile.read,
        "WIDEN": False,
        "SIZE": (D + 1) * D,
        "BLOCK": op.BLOCK_STATE,
    }
    constexprs = {name: values[name] for name in names if name in values}
    states = ("p_state", "p_parts", "p_grad_state")
    signature = {name: "i32" for name in names if name not in values}
    signature |= {name: "*fp32" if name in states else f"*{kind}" for name in names if name.startswith("p_")}
    signature |= {"eps": "fp32"} if "eps" in names else {}
    options = {"num_stages": 1} if summed else {}
    if kernel != "sum":
        options["num_warps"] = tile.warps
    multiples = [name for name in names if name.endswith(("_row", "_token"))]
    code = compiled(
        f"linear_attention_kernels.linear_attention_{kernel}_kernel",
        signature,
        constexprs,
        multiples,
        **options,
    )
    # summed in a fixed order
    assert not re.search(r"\b(atom|red)\.", code["ptx"])
    if kernel == "sum":
        return
    # the tensor cores' products are exact, or three of TF32 each; 9.0 has instructions of its own
    products = "f32.bf16.bf16" if (kernel, kind) == ("state", "bf16") else ""
    assert re.search(r"mma(\.sync|_async)", code["ptx"]) and products in code["ptx"]
    assert ("tf32" in code["ptx"]) == (kernel != "state" or kind == "fp32")
    if (kernel, D) != ("grad_q", 64):
        assert "STACK:0" in code["usage"]
