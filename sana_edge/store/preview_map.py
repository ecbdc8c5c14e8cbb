"""A linear map from a latent's cells to colours: previews that cost no decode.

``preview.json`` beside ``model_index.json``, or in an exported folder, is ``{"matrix": [[r, g, b], ...],
"bias": [r, g, b], "source": "...", "psnr": 22.3}``: a row for each channel of the latent, as the sampler has
it, and colours from -1 to 1. ``benchmarks/fit_preview.py`` fits and measures one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from sana_edge.store.folder import PREVIEW_MAP, read_json
from sana_edge.system.json_values import Between, Reader

# the longest side of a preview in pixels
_SIDE = 128
_Number = Annotated[float, Between(-1e4, 1e4)]
_Colour = tuple[_Number, _Number, _Number]


@dataclass(frozen=True)
class PreviewMap:
    """The content of a ``preview.json``.

    Attributes:
        matrix: (C, 3), bias: (3,), of colours from -1 to 1.
        source: what it was fitted to, for people.
        psnr: of its colours to those of decoded pictures, in dB; None where nobody has measured it.
    """

    matrix: Annotated[tuple[_Colour, ...], Between(1, 1024)]
    bias: _Colour
    source: str = ""
    psnr: _Number | None = None

    def colours(self, latent: NDArray[np.float32]) -> NDArray[np.float32]:
        """The cells (B, h, w, 3) of a latent (B, C, h, w), from about -1 to 1."""
        cells: NDArray[np.float32] = np.moveaxis(latent, 1, -1) @ np.array(self.matrix, np.float32)
        return cells + np.array(self.bias, np.float32)

    def pixels(self, latent: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The first latent of (B, C, h, w) as a picture (H, W, 3), enlarged to sides of about 128."""
        levels = np.rint(np.clip(self.colours(latent[:1])[0] * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)
        height, width = levels.shape[:2]
        scale = _SIDE / max(height, width)
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        return np.array(PIL.Image.fromarray(levels).resize(size, PIL.Image.Resampling.BICUBIC))


def read_map(folder: Path, channels: int) -> PreviewMap | None:
    """The map of a model folder or an exported one, whose latents have so many channels; None without one.

    That of the public DC-AE is known, and taken where ``vae/config.json`` has its scale.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / PREVIEW_MAP
    if os.path.isfile(path):
        reader = Reader(str(path), "download the model again, or delete the file", defaults=True)
        found: PreviewMap = reader.convert(read_json(path), PreviewMap)
        reader.require(len(found.matrix) == channels, "matrix", len(found.matrix), f"{channels} rows")
        return found
    config = folder / "vae" / "config.json"
    if channels != len(_DC_AE) or not os.path.isfile(config):
        return None
    public = read_json(config).get("scaling_factor") == DC_AE_SCALE
    return PreviewMap(_DC_AE, _DC_AE_BIAS, _DC_AE_SOURCE) if public else None


# of dc-ae-f32c32-sana-1.0 and -1.1
DC_AE_SCALE = 0.41407
_DC_AE_SOURCE = "city96/ComfyUI_ExtraModels, Sana/loader.py at 27489d3, which states no error"
_DC_AE_BIAS = (0.4358, 0.3814, 0.3388)
_DC_AE = (
    (-0.0020022, -0.0060736, -0.0017096),
    (0.0014221, 0.0036703, 0.0041083),
    (0.010081, 0.00026456, -0.014333),
    (-0.0024253, 0.0030967, -0.0010301),
    (0.0022158, 0.0077274, -0.013151),
    (0.011235, 0.005763, 0.0036146),
    (-0.072899, 0.011062, 0.036103),
    (0.032346, 0.028678, 0.025014),
    (0.0016469, -0.0011364, 0.0028366),
    (-0.035597, -0.023447, -0.0031172),
    (-0.00019985, -0.0020647, -0.012702),
    (0.00021318, 0.0012196, -0.00083461),
    (0.013766, 0.0027559, 0.0073567),
    (0.013027, 0.0026365, 0.0030405),
    (0.015335, 0.0094682, 0.0067312),
    (0.0051827, -0.0094865, 0.008508),
    (0.014365, -0.0032867, 0.0095108),
    (-0.0041216, -0.0019177, -0.0033726),
    (-0.0024757, 0.00051739, 0.002028),
    (-0.003595, 0.001072, 0.0053043),
    (-0.0051758, 0.008104, -0.037564),
    (-0.0038555, -0.0015529, -0.0035799),
    (-0.0066175, -0.0068484, -0.0099609),
    (-0.0021656, 0.00005577, 0.0014936),
    (-0.092857, -0.11379, -0.10919),
    (0.00077044, 0.0055594, 0.034755),
    (0.012714, 0.029729, 0.0031989),
    (-0.0011805, 0.0090548, -0.00041063),
    (0.00083309, 0.0049694, 0.0023087),
    (0.0078456, 0.003975, 0.0035655),
    (-0.0017552, 0.0049306, 0.01421),
    (-0.001479, 0.0028837, -0.0045687),
)
