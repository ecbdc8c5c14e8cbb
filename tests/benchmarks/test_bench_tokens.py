"""The benchmark of savings: multiply-adds by hand, and networks without a saving that compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bench_tokens
from bench_tokens import LATENTS, macs
from harness import study_tables
from sana_edge.bench.shapes import DENOISERS
from sana_edge.config import DenoiserConfig
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.store.known_models import BUNDLED
from works.denoiser import DenoiserWork


def test_multiply_adds_by_hand() -> None:
    config = DenoiserConfig(
        num_layers=1,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        mlp_ratio=2.5,
    )
    # 64 px: 2x2 tokens of 64 channels, 160 hidden; q k v and out, both products with K^T V
    attention = 4 * (4 * 64 * 64) + 2 * 4 * 64 * 32
    cross = 2 * (4 * 64 * 64) + 2 * 4 * bench_tokens.TOKENS * 64
    mix_ffn = 4 * (64 * 320 + 9 * 320 + 160 * 64)
    assert macs(config, LATENTS[0], 64) == attention + cross + mix_ffn + 2 * 4 * 32 * 64
    softmax = macs(config, LATENTS[0], 64, softmax=True)
    assert softmax - macs(config, LATENTS[0], 64) == 2 * 4 * 64 * (4 - 32)


def test_a_patch_of_two_on_f8_has_four_times_the_tokens() -> None:
    small, large = (latent.tokens(1024) for latent in LATENTS)
    assert (small, large) == (1024, 4096)
    # the paper's table 8 has 1.08 T and 4.19 T: ends and all
    assert macs(DENOISERS["1.6b"], LATENTS[1], 1024) / macs(DENOISERS["1.6b"], LATENTS[0], 1024) == (
        pytest.approx(4, rel=0.01)
    )


def test_what_is_switched_off_computes_the_same() -> None:
    work = DenoiserWork(
        dtype="fp32", device="cpu", threads=1, shapes="tiny", layers=2, size=96, tokens=5, steps=4
    )
    with torch.inference_mode():
        calls = bench_tokens.step_calls(work)
        expected = calls["step"]()
        assert len(calls) == 5
        for call in calls.values():
            # sums in another order: some tens of roundings of 2^-24
            torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
        encoder = TextEncoder.load(BUNDLED / "sana-tiny", dtype=torch.float32, device="cpu")
        kept, again = (call() for call in bench_tokens.text_calls(encoder).values())
        torch.testing.assert_close(kept, again, rtol=1e-4, atol=1e-4)


def test_tables() -> None:
    machine = {"gpu": None, "cores": 2, "cpu": "a CPU"}
    run = {"machine": machine, "commit": {"hash": None}, "date": "2026-11-29", "command": "python x"}
    row = {"latent": "f32c32p1", "attention": "linear", "tokens": 1024, "macs": 5 * 10**11, "seconds": 0.5}
    more = {**row, "latent": "f8c4p2", "tokens": 4096, "macs": 2 * 10**12, "seconds": 2.0}
    work = {"title": "a step", "rows": [{"name": "step", "seconds": 1.0, "ratio": 1.0, "difference": 0.0}]}
    work["rows"].append({"name": "not folded", "seconds": 1.25, "ratio": 1.25, "difference": 1e-7})
    data = {**run, "shapes": "0.6b", "size": 1024, "load_before": 0.1, "tokens": [row, more]}
    data["savings"] = [work]
    assert "| f8c4p2 | linear | 4,096 | 2.000 T | 2 s | 4.00 |" in study_tables.tokens(data).markdown()
    text = study_tables.savings(data).markdown()
    assert (
        "| a step: as it is | 1 s | 1.00 |  |" in text
        and "| - not folded | 1.25 s | 1.25 | 1.0e-07 |" in text
    )


def test_text_table() -> None:
    machine = {"gpu": None, "cores": 2, "cpu": "a CPU"}
    run = {"machine": machine, "commit": {"hash": None}, "date": "2026-11-29", "command": "python x"}
    row = {"encoder": "sana-tiny", "way": "bf16", "error": 0.0123, "worst": 0.02}
    wide = {**row, "encoder": "wide"}
    pictures = [{"way": "bf16", "psnr": [31.25, None, 40.0]}]
    data = {**run, "features": [row, wide], "pictures": pictures, "prompts": 3, "steps": 8}
    text = study_tables.text_features(data).markdown()
    assert "| sana-tiny | bf16 | 1.23% | 2.00% | 31.2 to 40.0 dB |" in text
    assert "| wide | bf16 | 1.23% | 2.00% |  |" in text


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    output = tmp_path / "tokens.json"
    options = ["--shapes", "tiny", "--size", "64", "--layers", "2", "--repeat", "1", "--text-layers", "1"]
    assert bench_tokens.main([*options, "--output", str(output)]) == 0
    data = json.loads(output.read_text())
    assert [len(work["rows"]) for work in data["savings"]] == [5, 2, 2]
