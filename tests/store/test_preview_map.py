"""Linear previews: what a preview.json may hold, the public DC-AE's, and the colours of a latent's cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_edge.errors import CheckpointError
from sana_edge.store.folder import PREVIEW_MAP, needed_files
from sana_edge.store.known_models import BUNDLED
from sana_edge.store.preview_map import DC_AE_SCALE, PreviewMap, read_map

GOOD: dict[str, Any] = {"matrix": [[0.5, 0, 0], [0, 1, -1]], "bias": [0, 0.5, 0]}


def test_colours_of_cells() -> None:
    made = PreviewMap(((0.5, 0.0, 0.0), (0.0, 1.0, -1.0)), (0.0, 0.5, 0.0))
    latent = np.zeros((1, 2, 3, 5), np.float32)
    latent[0, :, 1, 2] = 1, -1.5
    colours = made.colours(latent)
    assert colours.shape == (1, 3, 5, 3)
    assert colours[0, 1, 2].tolist() == [0.5, -1, 1.5] and colours[0, 0, 0].tolist() == [0, 0.5, 0]


@pytest.mark.parametrize(
    ("cells", "size"), [((8, 8), (128, 128)), ((3, 12), (32, 128)), ((400, 2), (128, 1))]
)
def test_pixels(cells: tuple[int, int], size: tuple[int, int]) -> None:
    """Flat latents give flat colours, and what is out of range is clipped."""
    made = PreviewMap(((0.5, 0.0, 0.0), (0.0, 1.0, -1.0)), (0.0, 0.5, 0.0))
    pixels = made.pixels(np.full((1, 2, *cells), 2, np.float32))
    assert pixels.shape == (*size, 3) and pixels.dtype == np.uint8
    # 1 is 255, and 2.5 and -2 are out of range
    assert {tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()} == {(255, 255, 0)}


def test_read(tmp_path: Path) -> None:
    assert read_map(tmp_path, 2) is None
    (tmp_path / PREVIEW_MAP).write_text(json.dumps({**GOOD, "what later versions add": 1}))
    found = read_map(tmp_path, 2)
    assert found is not None and found.matrix[1] == (0, 1, -1) and found.psnr is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"matrix": [[0, 0, 0]]}, "matrix is 1, expected 2 rows"),
        ({"matrix": [[0, 0], [0, 0]]}, "a list of 3"),
        ({"matrix": [["a", 0, 0], [0, 0, 0]]}, "a number"),
        ({"matrix": [[1e300, 0, 0], [0, 0, 0]]}, "-10000 to 10000"),
        ({"bias": None}, "a list of 3"),
        ({"source": 5}, "a string"),
    ],
    ids=str,
)
def test_damaged(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    (tmp_path / PREVIEW_MAP).write_text(json.dumps({**GOOD, **wrong}))
    with pytest.raises(CheckpointError, match=message) as error:
        read_map(tmp_path, 2)
    assert PREVIEW_MAP in error.value.message


def test_no_numbers_of_json(tmp_path: Path) -> None:
    for text in ('{"matrix": [[NaN, 0, 0], [0, 0, 0]], "bias": [0, 0, 0]}', "[", "3"):
        (tmp_path / PREVIEW_MAP).write_text(text)
        with pytest.raises(CheckpointError):
            read_map(tmp_path, 2)


def test_the_public_autoencoder_is_known(tmp_path: Path) -> None:
    """By its scale; another one of as many channels is not it."""
    (tmp_path / "vae").mkdir()
    for scale in (DC_AE_SCALE, 1.2):
        (tmp_path / "vae/config.json").write_text(json.dumps({"scaling_factor": scale}))
        assert (read_map(tmp_path, 32) is not None) == (scale == DC_AE_SCALE)
        assert read_map(tmp_path, 16) is None


@pytest.mark.parametrize("name", ["sana-tiny", "sana-tiny-int8", "sana-tiny-int8-onnx"])
def test_bundled(name: str) -> None:
    """All have the same latents, and so the same map."""
    found = read_map(BUNDLED / name, 32)
    assert found is not None and found == read_map(BUNDLED / "sana-tiny", 32)
    assert found.psnr is not None and found.psnr > 15


def test_it_goes_where_the_model_goes() -> None:
    assert PREVIEW_MAP in needed_files([PREVIEW_MAP, "model_index.json", "other.json"], None)
