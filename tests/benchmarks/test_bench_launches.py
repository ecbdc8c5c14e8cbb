"""The count of a decode's launches: the same as the emulator's, and of the DC-AE at most 120."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_launches
from sana_edge.bench.shapes import AUTOENCODERS, static_scales
from sana_edge.fused.decoder import fuse_decoder
from sana_edge.kernels.cuda import library
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.quantize import decoder_targets, quantize_decoder
from works.schedules import launches

IN_ORDER = pytest.mark.parametrize("emulated", [0], indirect=True, ids=["in order"])
CONFIG = replace(
    AUTOENCODERS["tiny"],
    decoder_block_out_channels=(16, 16, 16, 32, 32, 32),
    decoder_layers_per_block=(1, 1, 1, 1, 0, 0),
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    attention_head_dim=32,
)


@IN_ORDER
@pytest.mark.parametrize("calibrated", [True, False])
def test_is_what_the_emulator_launches(
    calibrated: bool, emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Autoencoder(CONFIG, encoder=False).requires_grad_(False).eval()
    latent = torch.randn(1, 32, 1, 2)
    scales = static_scales(model, decoder_targets(model), lambda: model.decode(latent.clone()))
    quantize_decoder(model, input_scales=scales if calibrated else None)
    fused = fuse_decoder(model.bfloat16())
    calls = 0
    call = library.Library.call

    def count(self: library.Library, *args: Any, **fields: Any) -> None:
        nonlocal calls
        calls += 1
        call(self, *args, **fields)

    monkeypatch.setattr(library.Library, "call", count)
    emulated.count()
    with torch.no_grad():
        fused.decode(latent.bfloat16())
    # none of the decoder's operations launches twice
    assert emulated.count()["launches"] == calls
    meta = fuse_decoder(bench_launches.int8_decoder(CONFIG, calibrated))
    with torch.device("meta"):
        same = torch.empty(1, 32, 1, 2, dtype=torch.bfloat16)
    found = launches(lambda: meta.decode(same))
    assert sum(number for name, number in found.items() if name.startswith("sana_edge")) == calls


def test_the_decoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, output = tmp_path / "before.json", tmp_path / "now.json"
    assert bench_launches.main(["--sizes", "512,1024", "--output", str(before)]) == 0
    assert bench_launches.main(["--sizes", "1024", "--before", str(before), "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert max(row["launches"] for row in found["rows"] if row["calibrated"]) <= 120
    assert found["before"]["rows"] == json.loads(before.read_text())["rows"]
    # of a picture of any size
    sizes = {(row["decoder"], row["calibrated"], row["launches"]) for row in found["before"]["rows"]}
    assert len(sizes) == 5
    assert "calibrated" in capsys.readouterr().out
