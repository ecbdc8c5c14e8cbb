"""ReLU linear attention in CUDA against its reference and exact sums, on the emulator."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sana_edge.errors import UnsupportedDevice
from sana_edge.kernels import reference, reference_fused
from sana_edge.kernels.cuda import launch

HERE = Path(__file__).parent
EPS = 1e-15
TYPES = [torch.float16, torch.bfloat16]
# largest relative error of rounding to a type
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# least step of fp16 beside the largest number of a head that is made 2^14 or more: half of 2^-24
LEAST = {torch.float16: 2.0**-39, torch.bfloat16: 0.0}
# images, tokens, heads, depth
SHAPES = [(2, 1, 1, 32), (1, 63, 2, 96), (3, 100, 3, 64), (1, 257, 6, 192), (2, 130, 36, 16), (1, 17, 70, 80)]


class Product(NamedTuple):
    values: Tensor
    scales: Tensor
    weight: Tensor
    weight_scales: Tensor
    bias: Tensor | None


def product(images: int, tokens: int, heads: int, depth: int) -> Product:
    """INT8 operands whose q, k and v are of size 1 or so, of both signs."""
    return Product(
        torch.randint(-127, 128, (images, tokens, depth), dtype=torch.int8),
        torch.rand(images, tokens) * 0.02 / depth**0.5,
        torch.randint(-127, 128, (96 * heads, depth), dtype=torch.int8),
        torch.rand(96 * heads) * 0.02,
        torch.randn(96 * heads),
    )


def exact_state(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The sums of k, which ReLU was applied to, and v in fp64; and how far off sums in fp32 may be.

    A sum of N terms has N roundings, or more where the terms' products are rounded, each of at most 2^-24 of
    what was added up so far, which is less than the sum of the terms' sizes: in any order. Tensor cores cut
    off where they do not round, which is 2^-23.
    """
    k64, v64 = (t.double().unflatten(-1, (heads, 32)).transpose(1, 2) for t in (k, v))
    ones = torch.ones_like(k64[..., :1])

    def sums(keys: Tensor, with_ones: Tensor) -> Tensor:
        read = keys.transpose(2, 3) @ with_ones
        return torch.cat([read[..., :-1], read[..., -1:].transpose(2, 3)], dim=2)

    error = (k.shape[1] + 2) * 2.0**-23 * sums(k64.abs(), torch.cat([v64.abs(), ones], -1))
    return sums(k64, torch.cat([v64, ones], -1)), error


def check_qkv(operands: Product, dtype: torch.dtype, heads: int, workspace: Tensor | None = None) -> Tensor:
    """q bit for bit, and the state, which is returned."""
    q, state = launch.qkv_linear_attention(*operands, dtype, heads, workspace)
    assert torch.equal(q, reference_fused.qkv_linear_attention(*operands, dtype, heads)[0])
    _, k, v = reference.w8a8_linear(*operands, dtype).chunk(3, dim=-1)
    exact, error = exact_state(k.relu(), v, heads)
    assert ((state - exact).abs() <= error).all()
    return state


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qkv(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_qkv(product(*shape), dtype, shape[2])


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("shape", [(2, 257, 33, 32), (1, 640, 26, 16)], ids=str)
def test_qkv_with_large_tiles(shape: tuple[int, int, int, int]) -> None:
    """96 blocks of (128, 128) and more: odd heads, last rows of images, q not a multiple of 128 wide."""
    check_qkv(product(*shape)._replace(bias=None), torch.float16, shape[2])


@pytest.mark.usefixtures("emulated")
def test_qkv_rounds_k_and_v() -> None:
    """The sums of what was not rounded to bfloat16 are further away than is allowed."""
    operands = product(1, 100, 2, 64)
    state = check_qkv(operands, torch.bfloat16, 2)
    _, k, v = reference.w8a8_linear(*operands).chunk(3, dim=-1)
    exact, error = exact_state(k.relu(), v, 2)
    assert ((state - exact).abs() > error).float().mean() > 0.5


@pytest.mark.usefixtures("emulated")
def test_qkv_of_hostile_values() -> None:
    """No ReLU(k) at all; the largest values; NaN and infinity, which stay in their image."""
    operands = product(3, 70, 3, 64)
    negative = operands.weight_scales.zero_().clone(), torch.full((288,), -2.0)
    state = check_qkv(operands._replace(weight_scales=negative[0], bias=negative[1]), torch.float16, 3)
    assert (state == 0).all()
    saturated = Product(
        torch.full_like(operands.values, 127),
        torch.full_like(operands.scales, 0.125),
        torch.full_like(operands.weight, 127),
        torch.full_like(operands.weight_scales, 0.5),
        None,
    )
    # 64 * 127² / 16 = 64516, which fp16 has room for
    check_qkv(saturated, torch.float16, 3)
    scales = saturated.scales.clone()
    scales[1, 7] = torch.nan
    scales[2, 69] = torch.inf
    q, state = launch.qkv_linear_attention(*saturated._replace(scales=scales), torch.float16, 3)
    assert state[0].isfinite().all() and state[1].isnan().all() and not state[2].isfinite().any()
    assert q[1, 7].isnan().all() and q[2, 69].isposinf().all() and q[0].isfinite().all()


@pytest.mark.parametrize(("heads", "seeds"), [(3, range(6)), (33, (2, 3))], ids=str)
def test_state_is_the_same_in_every_order(heads: int, seeds: Sequence[int], emulated: Any) -> None:
    """Bit for bit, whichever block comes last, in a workspace that is used again and again."""
    operands = product(2, 257, heads, 16)
    qkv, norm = torch.randn(2, 257, 96 * heads).half(), torch.randn(32 * heads)
    space = launch.workspace(2, 257, heads, torch.device("cpu"))
    found = []
    for seed in seeds:
        emulated.shuffle(seed)
        found.append(
            (
                *launch.qkv_linear_attention(*operands, torch.float16, heads, space),
                *launch.qk_norm_linear_attention(qkv, norm, heads, 1e-5, space),
            )
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("emulated")
def test_one_workspace_serves_all_shapes() -> None:
    space = launch.workspace(1, 640, 26, torch.device("cpu"))
    space[65536:] = 0xFF
    for shape in ((1, 640, 26, 16), (1, 100, 3, 32), (2, 130, 9, 16), (2, 1, 1, 32), (1, 100, 3, 32)):
        check_qkv(product(*shape), torch.float16, shape[2], space)
    assert (space[:65536] == 0).all()


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [s[:3] for s in SHAPES] + [(1, 4200, 1)], ids=str)
def test_qk_norm(
    shape: tuple[int, int, int], dtype: torch.dtype, guarded: Callable[[Tensor], Tensor]
) -> None:
    """Roots: C squares and their sum, a division, an addition and a root, which halves the relative error.

    k · root · norm_k is rounded twice more; what is summed has an error of that share of its size.
    """
    images, tokens, heads = shape
    qkv = guarded(torch.randn(images, tokens, 96 * heads).mul_(3).to(dtype))
    norm_k = guarded(torch.randn(32 * heads))
    roots, state = launch.qk_norm_linear_attention(qkv, norm_k, heads, 1e-5)
    expected_roots, expected_state = reference_fused.qk_norm_linear_attention(qkv, norm_k, heads, 1e-5)
    share = (32 * heads + 8) * 2.0**-24
    torch.testing.assert_close(roots, expected_roots, rtol=2 * share, atol=0)
    q, k, v = qkv.double().chunk(3, dim=-1)
    exact_roots = torch.stack([(t.square().mean(-1) + 1e-5).rsqrt() for t in (q, k)], dim=-1)
    torch.testing.assert_close(roots.double(), exact_roots, rtol=share, atol=0)
    keys = (k * exact_roots[..., 1:] * norm_k.double()).relu()
    exact, error = exact_state(keys, v, heads)
    sizes, _ = exact_state(keys, v.abs(), heads)
    error += (share + 2 * 2.0**-24) * sizes
    assert ((state - exact).abs() <= error).all()
    assert ((state - expected_state).abs() <= 2 * error).all()


@pytest.mark.usefixtures("emulated")
def test_qk_norm_of_hostile_values() -> None:
    qkv = torch.randn(3, 40, 96).to(torch.bfloat16)
    qkv[0] = 0
    qkv[1] = 1e18
    qkv[2, 3, 5] = torch.nan
    qkv[2, 39, 40] = torch.nan
    norm_k = torch.rand(32) + 0.5
    roots, state = launch.qk_norm_linear_attention(qkv, norm_k, 1, 1e-5)
    expected_roots, expected_state = reference_fused.qk_norm_linear_attention(qkv, norm_k, 1, 1e-5)
    torch.testing.assert_close(roots, expected_roots, rtol=1e-5, atol=0, equal_nan=True)
    assert (state[0] == 0).all() and state[2].isnan().all()
    torch.testing.assert_close(state[:2], expected_state[:2], rtol=1e-5, atol=0)


def check_finish(
    q: Tensor, state: Tensor, eps: float, options: dict[str, Tensor] | None = None, share: float = 0.01
) -> None:
    """Against the exact quotient: half a level, half a rounding to the type, and the error of the sums.

    A number of the state is two of the type, what the first leaves being rounded as well: off by the square
    of a rounding, 2^-22 or 2^-16, or by half of fp16's least step. Numerator and divisor are sums of 64
    products, at most 72 roundings off what their terms' sizes add up to, of 2^-23, since tensor cores cut
    off. Where that moves a quotient over the border between two roundings of the type (at most 2^-16 / 2^-8 =
    0.4 % of those of bf16, with little cancellation; of fp16 72 2^-23 / 2^-11, 1.8 %, were all of them as
    large and of one sign: they are less than a tenth of it), its level may change by 1, and where it is the
    largest of its row, so may the scale, by two roundings.
    """
    options = options or {}
    values, scales = launch.linear_attention_finish(q, state, eps, **options)
    expected_values, expected_scales = reference_fused.linear_attention_finish(q, state, eps, **options)
    rounding = ROUNDING[q.dtype]
    torch.testing.assert_close(scales, expected_scales, rtol=2 * rounding, atol=0, equal_nan=True)
    finite = expected_scales.isfinite()
    same = finite & (scales == expected_scales)
    assert same.sum() >= 0.9 * finite.sum() - 1
    apart = (values[same].int() - expected_values[same].int()).abs()
    assert apart.numel() == 0 or (apart.max() <= 1 and (apart > 0).double().mean() <= share)
    if "static_scale" in options:
        return
    q64, state64 = q.double(), state.double()
    if "roots" in options:
        norm = options["norm_q"].double()
        q64 = q64 * options["roots"][..., :1].double() * norm.sign()
        # its rows, and its sums of keys
        rows = norm.abs().view(1, -1, 32, 1)
        state64 = torch.cat([state64[:, :, :-1] * rows, state64[:, :, -1:] * rows.mT], dim=2)
    heads = q64.relu().unflatten(-1, (-1, 32)).transpose(1, 2)
    divisors = heads @ state64[:, :, -1:].transpose(2, 3) + eps
    exact = (heads @ state64[:, :, :-1]) / divisors
    sizes = (heads @ state64[:, :, :-1].abs()) / divisors
    largest = state64.abs().amax((2, 3), keepdim=True)
    least = LEAST[q.dtype] * largest * heads.sum(-1, keepdim=True) / divisors * (1 + exact.abs())
    # below 2^-14 fp16 has steps of 2^-24
    rounded = (rounding * exact.abs()).clamp(min=2.0**-25 if q.dtype == torch.float16 else 0)
    error = (2 * (72 * 2.0**-23 + rounding**2) * sizes + least + rounded).transpose(1, 2).flatten(2)
    exact = exact.transpose(1, 2).flatten(2)
    allowed = error + scales[..., None] * 0.5 * (1 + 1e-5)
    assert ((values * scales[..., None].double() - exact).abs() <= allowed * (1 + 1e-6))[finite].all()


def random_state(images: int, heads: int, tokens: int = 64) -> Tensor:
    k, v = torch.randn(2, images, tokens, 32 * heads).unbind()
    return reference_fused.linear_attention_state(k, v, heads)


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [s[:3] for s in SHAPES] + [(1, 5, 256)], ids=str)
def test_finish(shape: tuple[int, int, int], dtype: torch.dtype, guarded: Callable[[Tensor], Tensor]) -> None:
    images, tokens, heads = shape
    q = guarded(torch.randn(images, tokens, 32 * heads).to(dtype))
    state = guarded(random_state(images, heads))
    check_finish(q, state, EPS)
    check_finish(q.relu(), state, EPS, {"static_scale": torch.tensor(0.01)})


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_finish_of_a_normed_third_of_qkv(dtype: torch.dtype, guarded: Callable[[Tensor], Tensor]) -> None:
    """norm_q has negative weights and zeros; rows of q lie 3 C apart."""
    for images, tokens, heads in ((2, 19, 3), (1, 1, 6), (3, 33, 36)):
        qkv = guarded(torch.randn(images, tokens, 96 * heads).to(dtype))
        norm_k, norm_q = torch.randn(2, 32 * heads).unbind()
        norm_q[::7] = 0
        roots, state = launch.qk_norm_linear_attention(qkv, norm_k, heads, 1e-5)
        options = {"roots": guarded(roots * 0.01), "norm_q": guarded(norm_q)}
        check_finish(qkv.chunk(3, dim=-1)[0], guarded(state), EPS, options)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("eps", [1e-15, 1e-8])
def test_finish_of_hostile_values(eps: float) -> None:
    """No ReLU(q), no ReLU(k); divisors that eps decides; the largest numbers; rows that are not finite."""
    q = torch.randn(3, 20, 96).half()
    state = random_state(3, 3)
    q[0, 0] = -1
    q[0, 1, :32] = 0
    q[0, 2] = 60000
    q[0, 3] = 2.0**-24
    q[0, 4, 5] = torch.nan
    q[0, 5, 95] = torch.inf
    q[0, 6, 95] = -torch.inf
    state[1] *= 1e-16
    state[2] *= 1e29
    check_finish(q, state, eps)
    values, scales = launch.linear_attention_finish(q, state, eps)
    assert scales[0, 0] == 1 and (values[0, 0] == 0).all()
    assert scales[0].isfinite().tolist() == [row not in (4, 5) for row in range(20)]
    state[1] = 0
    values, scales = launch.linear_attention_finish(q[1:2], state[1:2], eps)
    assert (values == 0).all() and (scales == 1).all()
    state[2, 1, 0, 0] = torch.nan
    q[2, :, 32] = 1
    _, scales = launch.linear_attention_finish(q, state, eps)
    assert scales[2].isnan().all()


def test_no_bank_conflicts(emulated: Any) -> None:
    emulated.count()
    for heads in (3, 33):
        check_qkv(product(2, 200, heads, 64), torch.float16, heads)
    counted = emulated.count()
    assert counted["matrix_reads"] > 0 and counted["bank_conflicts"] == 0
    for heads in (3, 36):
        launch.linear_attention_finish(torch.randn(1, 40, 32 * heads).half(), random_state(1, heads), EPS)
        counted = emulated.count()
        assert counted["matrix_reads"] > 0 and counted["bank_conflicts"] == 0


@pytest.mark.parametrize(
    ("processors", "shared", "tokens"), [(1, 99, 32), (8, 99, 16), (1, 40, 16), (1, 24, 8)]
)
def test_tokens_of_a_block(emulated: Any, processors: int, shared: int, tokens: int) -> None:
    """As many as there is shared memory for; 16 where 32 would leave processors without any."""
    emulated.pretend(89, processors, shared << 10)
    q, state = torch.randn(2, 60, 32 * 33).bfloat16(), random_state(2, 33)
    emulated.count()
    check_finish(q, state, EPS)
    assert emulated.count()["blocks"] == 2 * -(-60 // tokens)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_finish_keeps_more_of_the_state_than_16_bits(dtype: torch.dtype) -> None:
    """Ones that cancel but for multiples of 2^-14, which sums of them in fp32 are exactly, in any order."""
    state = torch.ones(1, 1, 33, 32)
    state[:, :, 1:32:2] = -1
    state[:, :, 0] += torch.arange(32) * 2.0**-14
    values, scales = launch.linear_attention_finish(torch.ones(1, 5, 32).to(dtype), state, EPS)
    wanted = torch.arange(32) * 2.0**-14 / 32
    torch.testing.assert_close(scales, (wanted[31] / 127).expand(1, 5), rtol=2 * ROUNDING[dtype], atol=0)
    assert ((values * scales[..., None] - wanted).abs() <= wanted * ROUNDING[dtype] + scales.max() / 2).all()


def test_turing(emulated_turing: Any) -> None:
    emulated_turing.pretend(75, 40, 64 << 10)
    for shape in ((2, 100, 3, 48), (1, 140, 66, 32)):
        check_qkv(product(*shape), torch.float16, shape[2])
    with pytest.raises(UnsupportedDevice, match="no bf16"):
        check_qkv(product(1, 16, 1, 32), torch.bfloat16, 1)
    for dtype in TYPES:
        q = torch.randn(1, 18, 70 * 32).to(dtype)
        check_finish(q, random_state(1, 70), EPS)
        qkv = torch.randn(2, 50, 192).to(dtype)
        roots, state = launch.qk_norm_linear_attention(qkv, torch.ones(64), 2, 1e-5)
        expected = reference_fused.qk_norm_linear_attention(qkv, torch.ones(64), 2, 1e-5)
        torch.testing.assert_close((roots, state), expected, rtol=1e-4, atol=1e-4)


def test_maps(tmp_path: Path) -> None:
    """Every row of the weight in one tile, every number in one place: linear_attention_maps.cpp."""
    program = tmp_path / "maps"
    flags = [
        "-std=c++17",
        "-DSANA_EDGE_EMULATED=890",
        "-DSANA_EDGE_BUILDING",
        f"-I{HERE.parents[2] / 'csrc'}",
    ]
    emulator = HERE.parents[2] / "csrc" / "emulator" / "emulator.cpp"
    sources = [HERE / "linear_attention_maps.cpp", emulator]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, *sources, "-o", program], check=True)
    assert subprocess.run([program]).returncode == 0
