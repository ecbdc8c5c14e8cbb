"""Models of transformers from a folder: their size is that of the weights beside the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_clip
from transformers import AutoModel, CLIPModel

from sana_edge.errors import CheckpointError
from sana_edge.store.pretrained import load_pair


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_clip.write_clip(tmp_path / "clip")
    return tmp_path / "clip"


def change(folder: Path, tower: str, **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config[tower] |= values
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", [CLIPModel, AutoModel])
def test_a_model_and_its_processor(folder: Path, kind: Any) -> None:
    processor, model = load_pair(kind, folder, "cpu")
    assert not model.training and processor.tokenizer is not None


@pytest.mark.parametrize("kind", [CLIPModel, AutoModel])
@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
def test_what_the_weights_have_no_numbers_for(folder: Path, kind: Any, tower: str) -> None:
    """32 GB would be made up."""
    change(folder, tower, hidden_size=32_000)
    with pytest.raises(CheckpointError, match=r"numbers, the weights beside it have [\d,]+ bytes") as caught:
        load_pair(kind, folder, "cpu")
    assert caught.value.hint == "the folder is damaged; download the model again"


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded as CLIPModel with a processor: ") as caught:
        load_pair(CLIPModel, folder, "cpu")
    assert "it needs config.json, safetensors" in caught.value.hint


@pytest.mark.parametrize("layers", [10_000_000, 1e300])
def test_endless_layers(folder: Path, layers: float) -> None:
    change(folder, "text_config", num_hidden_layers=layers)
    with pytest.raises(CheckpointError, match=r"asks for .* layers"):
        load_pair(CLIPModel, folder, "cpu")
