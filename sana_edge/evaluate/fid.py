"""FID (Heusel et al. 2017, arXiv 1706.08500) through torchmetrics, of pictures to a folder of others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sana_edge.errors import (
    CheckpointError,
    InvalidInput,
    MissingDependency,
    ModelNotFound,
    torch_extra,
)
from sana_edge.evaluate.clip import import_torchmetrics
from sana_edge.init_image import read_image
from sana_edge.progress import Progress

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""The Inception of the original, as torch-fidelity publishes it."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
FEATURES = 2048


def find_inception(given: Path | None) -> Path:
    """The weights: a file, or torch's download folder, where torch-fidelity keeps them.

    Raises:
        SanaError: they are not there, or torchmetrics or torch-fidelity is missing.
    """
    for name in ("torchmetrics", "torch_fidelity"):
        if find_spec(name) is None:
            hint = "pip install 'sana-edge[fid]', with torchvision from where torch came from"
            raise MissingDependency(f"FID needs {name}, which is not installed", hint)
    with torch_extra():
        import torch
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS if given is None else given
    if not os.path.isfile(path):
        hint = f"give {WEIGHTS} of torch-fidelity's releases with --inception, or put it there"
        raise ModelNotFound(f"FID needs the weights of Inception, and there is no {path}", hint)
    return path


def reference_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and those below it.

    Raises:
        InvalidInput: there is no such folder, or it has fewer than two pictures.
    """
    if not os.path.isdir(folder):
        raise InvalidInput(f"no folder {folder}", "give a folder of pictures with --reference")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if len(found) < 2:
        hint = f"FID needs at least two, thousands to mean something; it reads {', '.join(ENDINGS)}"
        raise InvalidInput(f"{folder} has {len(found)} pictures", hint)
    return found


class Fid:
    """The distance to a folder of pictures, whose statistics are computed once."""

    def __init__(self, reference: Sequence[Path], weights: Path, tell: Progress) -> None:
        """Raises: CheckpointError: the weights are others; InvalidInput: a picture cannot be read."""
        with torch_extra():
            import torch
        fid = import_torchmetrics("image.fid")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._metric: Any = fid.FrechetInceptionDistance(
                FEATURES, reset_real_features=False, feature_extractor_weights_path=str(weights)
            ).to(self.device)
        except Exception as error:  # whatever the unpickler meets
            raise CheckpointError(
                f"{weights} is not the Inception of FID: {error}", f"give {WEIGHTS}"
            ) from error
        self._add(reference, "reference pictures", tell, real=True)

    def distance(self, paths: Sequence[Path], tell: Progress) -> float:
        """0 or larger; of at least two pictures, and biased towards large values by few."""
        self._metric.reset()
        self._add(paths, "FID", tell, real=False)
        return max(float(self._metric.compute()), 0.0)

    def _add(self, paths: Sequence[Path], what: str, tell: Progress, *, real: bool) -> None:
        import torch

        for done, path in enumerate(paths, start=1):
            pixels = torch.from_numpy(np.moveaxis(read_image(path), -1, 0).copy())
            with torch.inference_mode():
                self._metric.update(pixels[None].to(self.device), real=real)
            tell(what, done, len(paths))
