"""patch_embed and velocity_head in CUDA against their references, on the emulator.

patch_embed: sums of at most 256 products err by at most as many roundings of 2^-24 of the absolute sum,
before the rounding to 16 bits; 32 products of normal numbers by less than 1e-5: results are equal or
neighbours.
velocity_head: a sum of C products of rows that LayerNorm gave an absolute size of about 1 with weights of
1/sqrt(C): both sides err by some log2(C) + 40 roundings of 2^-24 of the absolute sum, sqrt(C), and guidance
g multiplies that by 2 g: within 3e-6 · sqrt(C) · (1 + 2 g), where errors at random come to a hundredth of
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sana_edge.kernels import reference_fused
from sana_edge.kernels.cuda import launch

if TYPE_CHECKING:
    pass

BOTH = [torch.float16, torch.bfloat16]
EPS = 1e-6


def cells(images: int, channels: int, height: int, width: int, columns: int) -> tuple[Tensor, ...]:
    """Latent, weight, bias and positions."""
    return (
        torch.randn(images, channels, height, width),
        torch.randn(channels, columns),
        torch.randn(columns),
        torch.randn(height * width, columns),
    )


def close_tokens(found: Tensor, expected: Tensor) -> None:
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=eps, atol=1e-5, equal_nan=True)
    assert (found == expected).float().mean() > 0.99


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [(2, 32, 5, 7, 192), (1, 32, 8, 9, 1152), (3, 3, 1, 1, 8), (1, 32, 3, 11, 2240), (2, 256, 3, 3, 264)],
    ids=str,
)
def test_patch_embed(shape: tuple[int, int, int, int, int], copies: int, dtype: torch.dtype) -> None:
    latent, weight, bias, positions = cells(*shape)
    for given in (positions, None):
        close_tokens(
            launch.patch_embed(latent, weight, bias, given, copies, dtype),
            reference_fused.patch_embed(latent, weight, bias, given, copies, dtype),
        )


@pytest.mark.usefixtures("emulated")
def test_patch_embed_of_integers_is_exact() -> None:
    latent, weight, bias, positions = (t.mul(4).round() for t in cells(2, 32, 5, 7, 264))
    found = launch.patch_embed(latent, weight, bias, positions, 2, torch.bfloat16)
    assert torch.equal(found, reference_fused.patch_embed(latent, weight, bias, positions, 2, torch.bfloat16))


@pytest.mark.usefixtures("emulated", "guarded_outputs")
def test_patch_embed_of_hostile_cells() -> None:
    """A NaN stays in its token; what fp16 cannot hold is infinite, as its rounding says."""
    latent, weight, bias, positions = cells(1, 32, 3, 3, 16)
    latent[0, 4, 1, 1] = torch.nan
    latent[0, 5, 2, 2] = 1e5
    found = launch.patch_embed(latent, weight, bias, positions, 1, torch.float16)
    expected = reference_fused.patch_embed(latent, weight, bias, positions, 1, torch.float16)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
    assert found.isnan().any(-1).nonzero()[:, 1].tolist() == [4]


def head(
    images: int, tokens: int, columns: int, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, scale, shift (parts of one table), weight and bias."""
    table = torch.randn(images, 2, columns)
    table[:, 1] += 1
    return (
        (torch.randn(images, tokens, columns) * 2 + 0.5).to(dtype),
        table[:, 1:],
        table[:, :1],
        torch.randn(channels, columns) / columns**0.5,
        torch.randn(channels),
    )


def check_head(shape: tuple[int, int, int, int, int], dtype: torch.dtype, guidance: float | None) -> None:
    images, height, width, columns, channels = shape
    x, scale, shift, weight, bias = head(
        images if guidance is None else 2 * images, height * width, columns, channels, dtype
    )
    number = None if guidance is None else torch.tensor(guidance)
    arguments = (x, scale, shift, EPS, weight, bias, number, (height, width))
    found = launch.velocity_head(*arguments)
    tolerance = 3e-6 * columns**0.5 * (1 + 2 * abs(guidance or 0))
    torch.testing.assert_close(found, reference_fused.velocity_head(*arguments), rtol=0, atol=tolerance)


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("guidance", [None, 4.5, 1.0, 0.0])
@pytest.mark.parametrize(
    "shape",
    [(2, 5, 7, 192, 32), (1, 3, 3, 1152, 32), (1, 2, 3, 2240, 32), (3, 1, 1, 16, 5), (1, 1, 9, 64, 256)],
    ids=str,
)
def test_velocity_head(
    shape: tuple[int, int, int, int, int], guidance: float | None, dtype: torch.dtype
) -> None:
    check_head(shape, dtype, guidance)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("columns", [1280, 1296, 2560, 2576, 5120, 5136, 8192])
def test_velocity_head_where_the_tokens_of_a_block_change(columns: int) -> None:
    check_head((1, 3, 3, columns, 32), torch.bfloat16, 4.5)


@pytest.mark.usefixtures("emulated", "guarded_outputs")
def test_velocity_head_keeps_not_a_number_in_its_token() -> None:
    x, scale, shift, weight, bias = head(4, 9, 64, 32, torch.float16)
    x[0, 3, 7] = torch.nan
    x[3, 8, 63] = torch.inf
    found = launch.velocity_head(x, scale, shift, EPS, weight, bias, torch.tensor(2.0), (3, 3))
    broken = found.flatten(2).isnan()
    assert broken[0, :, 3].all()
    assert broken[1, :, 8].all()
    assert int(broken.sum()) == 2 * 32


@pytest.mark.usefixtures("emulated")
def test_velocity_head_with_vectors_for_all_images() -> None:
    x, scale, shift, weight, bias = head(4, 6, 64, 32, torch.float16)
    arguments = (x, scale[0, 0], shift[0, 0], EPS, weight, bias, torch.tensor(3.0), (2, 3))
    torch.testing.assert_close(
        launch.velocity_head(*arguments), reference_fused.velocity_head(*arguments), rtol=0, atol=2e-4
    )


@pytest.mark.usefixtures("emulated_turing")
def test_turing() -> None:
    given = cells(1, 32, 3, 5, 1152)
    close_tokens(
        launch.patch_embed(*given, 2, torch.float16), reference_fused.patch_embed(*given, 2, torch.float16)
    )
    check_head((1, 3, 5, 1152, 32), torch.float16, 4.5)
