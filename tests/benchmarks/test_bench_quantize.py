"""The benchmark of quantizing, on a model of a few kilobytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import bench_quantize
import random_model
from sana_edge import Sana
from sana_edge.bench.random_model import write_model
from sana_edge.bench.shapes import static_scales
from sana_edge.errors import SanaError
from sana_edge.export.source import describe
from sana_edge.int8.linear import Linear
from sana_edge.store import hub


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_sizes_are_those_of_the_files(model: Path) -> None:
    found = bench_quantize.sizes(model)
    assert set(found) == set(bench_quantize.COMPONENTS)
    for name in ("transformer", "text_encoder"):
        (path,) = (model / name).glob("*.safetensors")
        length = int.from_bytes(path.read_bytes()[:8], "little")
        assert found[name]["stored"] == path.stat().st_size - 8 - length
    # the encoder does not count
    assert found["vae"]["stored"] < sum(path.stat().st_size for path in (model / "vae").glob("*"))


def test_the_whole_run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert bench_quantize.main([str(model), "--output", str(output)]) == 0
    data = json.loads(output.read_text())
    assert data["quantize"]["seconds"] > 0 and data["quantize"]["peak_memory"] > 1 << 24
    assert data["bytes"]["int8"]["transformer"]["stored"] < data["bytes"]["float"]["transformer"]["fp32"]
    assert str(tmp_path) not in output.read_text()
    assert "denoiser" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".bench-")] == []


def test_a_failing_command_says_why(tmp_path: Path) -> None:
    with pytest.raises(SanaError, match="sana-edge quantize failed: error: "):
        bench_quantize.command("quantize", str(tmp_path / "none"), "--output", str(tmp_path / "out"))


def test_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_quantize.main([]) == 1
    assert "no model folder" in capsys.readouterr().err


def test_velocity_error(tmp_path: Path) -> None:
    output = tmp_path / "error.json"
    assert bench_quantize.main(["--error", "tiny", "--size", "64", "--output", str(output)]) == 0
    errors = json.loads(output.read_text())["errors"]
    # three of the schedule's times; rounding to 127 steps is about half a percent of a layer
    assert len(errors) == 3 and all(1e-4 < error < 1e-2 for error in errors.values())


@pytest.mark.slow
def test_a_random_sprint_model(tmp_path: Path) -> None:
    """Two steps without guidance, in diffusers too, and INT8 with the scales that graphs need."""
    from diffusers import SanaSprintPipeline

    folder, package = tmp_path / "float", tmp_path / "int8"
    settings = {"dtype": torch.bfloat16, "text_layers": 1, "text_width": 48}
    write_model(folder, "tiny", **settings, force=False, sprint=True)  # type: ignore[arg-type]
    assert random_model.main([str(package), "--package-of", str(folder)]) == 0
    pipeline = SanaSprintPipeline.from_pretrained(folder)
    assert pipeline.transformer.config.guidance_embeds and pipeline.scheduler.config.sigma_data == 0.5
    assert describe(hub.resolve(str(package)), int8=True).sampler.kind == "scm"
    pictures = []
    for path in (folder, package):
        with Sana.load(str(path), dtype="fp32") as sana:
            image = sana.generate("a cat", size=(64, 64), seed=1)
        assert (image.metadata["steps"], image.metadata["sampler"]) == (2, "scm")
        pictures.append(image.pixels.astype(float))
    # of levels: INT8 moves the picture of noise, and little
    assert 0 < abs(pictures[0] - pictures[1]).mean() < 8


def test_static_scales() -> None:
    layer, unused = Linear(3, 2), Linear(3, 2)
    model = torch.nn.ModuleDict({"one": layer, "two": unused})
    scales = static_scales(model, ["one", "two"], lambda: layer(torch.tensor([[1.0, -254.0, 3.0]])))
    assert scales == {"one": 2.0}
    assert layer.observer is None and unused.observer is None
