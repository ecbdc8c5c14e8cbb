"""Parts that do not belong together are refused before a step is made, or the right sampler is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_edge import Sana
from sana_edge.cli.main import main
from sana_edge.config import DenoiserConfig
from sana_edge.errors import CheckpointError
from sana_edge.store import hub
from sana_edge.store.pairing import read_sampler


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("text_encoder", {"hidden_size": 48}, "texts of 32 channels, the text encoder writes 48"),
        ("transformer", {"caption_channels": 2304}, "texts of 2304 channels, the text encoder writes 32"),
        ("vae", {"latent_channels": 16}, "latents of 32 channels, the autoencoder decodes 16"),
        ("transformer", {"out_channels": 64}, "reads 32 channels and predicts 64"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "quantize", "export"])
def test_parts_of_different_models(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    component: str,
    changes: dict[str, Any],
    message: str,
    command: str,
) -> None:
    edit(folder / component / "config.json", **changes)
    arguments = [str(folder), "--output", str(tmp_path / "out")]
    if command == "generate":
        arguments = ["--prompt", "a", "--model", str(folder)]
    assert main([command, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("sprint", [False, True], ids=["plain", "sprint"])
def test_the_right_sampler_is_taken(
    tiny_folder: Path, tiny_sprint_folder: Path, tmp_path: Path, sprint: bool
) -> None:
    right, other = (tiny_sprint_folder, tiny_folder) if sprint else (tiny_folder, tiny_sprint_folder)
    mixed = tmp_path / "mixed"
    shutil.copytree(right, mixed)
    shutil.copy(other / "scheduler/scheduler_config.json", mixed / "scheduler/scheduler_config.json")
    with Sana.load(right) as sana, Sana.load(mixed) as taken:
        expected = sana.generate("a red house", seed=3, steps=2)
        picture = taken.generate("a red house", seed=3, steps=2)
    assert np.array_equal(picture.pixels, expected.pixels)
    note = next(note for note in picture.notes if "scheduler" in note.lower() and "in its place" in note)
    assert ("SCMScheduler is used" in note) == sprint
    assert not any("in its place" in note for note in expected.notes)


@pytest.mark.parametrize(("cells", "shift"), [(16, 3.0), (32, 3.0), (128, 6.0)])
def test_the_shift_of_a_sampler_that_is_taken(
    tiny_folder: Path, tiny_sprint_folder: Path, cells: int, shift: float
) -> None:
    config = DenoiserConfig(sample_size=cells)
    sampler, (note,) = read_sampler(tiny_sprint_folder, config)
    assert (sampler.kind, sampler.flow_shift) == ("flow-dpm", shift)
    assert note.startswith("the folder's SCMScheduler does not suit its transformer/, no Sprint denoiser")
    # what a folder says of the right kind is kept
    sampler, notes = read_sampler(tiny_folder, config)
    assert (sampler.flow_shift, notes) == (3.0, ())


def test_a_base_that_does_not_fit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder / "text_encoder/config.json", hidden_size=48)
    with pytest.raises(CheckpointError):
        hub.resolve(str(folder))
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    arguments = ["convert", str(file), "--output", str(tmp_path / "out"), "--base", str(folder)]
    assert main(arguments) == 1
    assert "texts of 32 channels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
