"""The benchmark of growth: the softmax layer is one, the exponent a slope, and a run leaves file and plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import bench_growth
from sana_edge.config import DenoiserConfig


def test_softmax_stands_in_for_linear_attention() -> None:
    config = DenoiserConfig(num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=32)
    block = bench_growth.SoftmaxBlock(config)
    x = torch.randn(2, 6, config.dim)
    q, k, v = (part.view(2, 6, 2, 32).transpose(1, 2) for part in block.qkv(x).chunk(3, dim=-1))
    weights = (q @ k.transpose(2, 3) / 32**0.5).softmax(-1)
    expected = block.out((weights @ v).transpose(1, 2).reshape(x.shape))
    # sums of 32 and 64 products: some tens of roundings of 2^-24
    torch.testing.assert_close(block._attend(x), expected, rtol=1e-5, atol=1e-5)


def test_exponent() -> None:
    rows = [{"tokens": n, "linear": 3e-6 * n, "softmax": 1e-9 * n**2} for n in (256, 1024, 4096, 16384)]
    assert bench_growth.exponent(rows, "linear") == pytest.approx(1)
    assert bench_growth.exponent(rows, "softmax") == pytest.approx(2)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = DenoiserConfig(num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=32)
    monkeypatch.setitem(bench_growth.DENOISERS, "0.6b", small)
    output = tmp_path / "growth.json"
    options = ["--sizes", "64,128", "--repeat", "1", "--threads", "1", "--output", str(output)]
    assert bench_growth.main(options) == 0
    data = json.loads(output.read_text())
    assert [row["tokens"] for row in data["rows"]] == [4, 16] and set(data["exponents"]) == {
        "linear",
        "softmax",
    }
    with Image.open(tmp_path / "growth.png") as picture:
        assert min(picture.size) > 300
    assert "Exponents of growth" in capsys.readouterr().out
