"""The encoder: its graph runs beside the torch module, on noise."""

from __future__ import annotations

import torch

from sana_edge.export.verify.agreement import Agreement
from sana_edge.export.verify.runner import GraphRunner
from sana_edge.store import package
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.manifest import ENCODER
from sana_edge.torch_runtime.load import load_encoder

# pixels, of whole cells
_HEIGHT, _WIDTH = 128, 192


def compare_encoder(model: ResolvedModel, graphs: GraphRunner, agreement: Agreement) -> None:
    """Compare the latents of one picture.

    Raises:
        SanaError: too far off.
    """
    encoder = load_encoder(model, device=torch.device("cpu"), dtype=torch.float32)
    scale = float(package.describe(model.path / "vae").values["scaling_factor"])
    pixels = torch.rand(1, 3, _HEIGHT, _WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = graphs.run(ENCODER, pixels=pixels.numpy())
    agreement.check(ENCODER, found, latent=(encoder(pixels) * scale).numpy())
