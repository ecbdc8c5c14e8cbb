"""The benchmarks of the GPU path, as far as the emulator can run them."""

from __future__ import annotations

import bench_kernels
import contenders
import decoder_work
import pytest
import roofline
import torch
from bench_kernels import Peaks
from kernel_cases import Case, Sizes, cases

from sana_edge.fused.decoder import fuse_decoder

CPU = torch.device("cpu")


@pytest.fixture
def sizes() -> Sizes:
    return Sizes.of("tiny", 128, 1, True, 20)


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


def test_a_laptop_takes_its_share_of_what_was_measured() -> None:
    """A product at half of the peak here is at half of the laptop's peak there; so is a copy."""
    rows = [
        {"kernel": "product", "seconds": 2e-3, "share_of_int8_peak": 0.5, "share_of_bandwidth": 0.01},
        {"kernel": "rows", "seconds": 1e-3, "share_of_int8_peak": None, "share_of_bandwidth": 0.8},
    ]
    data = {
        "peaks": {"int8_tops": 1000.0, "copy_gb_per_s": 4000.0},
        "kernels": [{**row, "side": 1024, "pictures": 1, "calls_per_step": 10} for row in rows],
    }
    laptop = roofline.Laptop("half", 100e12, 400e9)
    product = 1e-3 * 10 / 0.5
    copy = 0.8e-3 * 10 / 0.8
    assert roofline.projected(laptop, data, 1024) == pytest.approx(10 * (product + copy))
    assert "(projection)" in roofline.table(data, 1024, 20)
    with pytest.raises(SystemExit, match="512 px"):
        roofline.projected(laptop, data, 512)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main([]) == 1
    said = capsys.readouterr().err
    assert "error:" in said
    assert "hint:" in said


@pytest.mark.usefixtures("emulated")
def test_the_decoder_that_is_timed_is_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the runtime would fuse it; here it is told that it would."""
    work = decoder_work.DecoderWork(
        dtype="bf16", device="cpu", threads=1, shapes="tiny", size=64, tiled=False
    )
    loaders = work.loaders()
    expected = loaders[contenders.OURS]()["decode"]()
    monkeypatch.setattr(decoder_work, "_fuses", lambda work: True)
    fused = []
    monkeypatch.setattr(
        decoder_work, "fuse_decoder", lambda decoder: fused.append(fuse_decoder(decoder)) or fused[0]
    )
    found = loaders[contenders.INT8]()["decode"]()
    assert len(fused) == 1
    assert float((found - expected).norm() / expected.norm()) < work.int8_tolerance["decode"] + 0.1
