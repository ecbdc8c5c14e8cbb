"""The benchmarks of the GPU path, as far as the emulator can run them."""

from __future__ import annotations

import pytest
import torch

import bench_kernels
from bench_kernels import Peaks
from harness.results import INT8, OURS
from sana_edge.fused.decoder import fuse_decoder
from works import decoder
from works.kernel_cases import Case, Sizes, cases

CPU = torch.device("cpu")


@pytest.fixture
def sizes() -> Sizes:
    return Sizes.of("tiny", 128, 1, True, 20)


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
def test_every_kernel_and_what_it_replaces(sizes: Sizes) -> None:
    found = list(cases(sizes, CPU, torch.float16))
    # a block's launches, and both ends
    layers = sizes.config.num_layers
    assert sum(case.calls for case in found) == 12 * layers + 2
    for case in found:
        case.run()
        if case.replaced is not None:
            case.replaced()


def test_counts_of_a_step() -> None:
    """The 0.6B's step at 1024 px with guidance; its negative prompt is folded."""
    full = Sizes.of("0.6b", 1024, 1, True, 60)
    tokens, C, hidden = 1024, 1152, 2880
    products = 2 * tokens * (3 * C * C + C * C + 2 * hidden * C + hidden * C) + tokens * 2 * C * C
    assert 28 * 2 * products == pytest.approx(1.9e12, rel=0.03)
    assert full.rows == 2 * tokens
    assert full.asked == tokens


def test_shares_are_of_the_peaks() -> None:
    case = Case("one", "1x1", 3, 2_000, 500, lambda: None, lambda: None)
    row = bench_kernels.measured(case, CPU, Peaks(1e12, 1e9))
    assert row["share_of_int8_peak"] == pytest.approx(2_000 / row["seconds"] / 1e12)
    assert row["share_of_bandwidth"] == pytest.approx(500 / row["seconds"] / 1e9)
    assert len(row["samples"]) == bench_kernels.TURNS
    assert "one" in bench_kernels.table([{"side": 64, "pictures": 1, **row}])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main([]) == 1
    said = capsys.readouterr().err
    assert "error:" in said
    assert "hint:" in said


@pytest.mark.usefixtures("emulated")
def test_the_decoder_that_is_timed_is_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the runtime would fuse it; here it is told that it would."""
    work = decoder.DecoderWork(dtype="bf16", device="cpu", threads=1, shapes="tiny", size=64, tiled=False)
    loaders = work.loaders()
    expected = loaders[OURS]()["decode"]()
    monkeypatch.setattr(decoder, "_fuses", lambda work: True)
    fused = []
    monkeypatch.setattr(decoder, "fuse_decoder", lambda model: fused.append(fuse_decoder(model)) or fused[0])
    found = loaders[INT8]()["decode"]()
    assert len(fused) == 1
    assert float((found - expected).norm() / expected.norm()) < work.int8_tolerance["decode"] + 0.1
