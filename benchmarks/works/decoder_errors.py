"""How far a fused INT8 decoder is from its float one, by the definitions of its operations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from sana_edge.bench.shapes import AUTOENCODERS, static_scales
from sana_edge.fused.decoder import fuse_decoder
from sana_edge.int8.quant import relative_error
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.quantize import decoder_targets, quantize_decoder
from sana_edge.store.hub import resolve
from sana_edge.torch_runtime.load import load_decoder

CPU = torch.device("cpu")
# narrow, with everything that the DC-AE has
SHAPES = replace(
    AUTOENCODERS["tiny"],
    decoder_block_out_channels=(16, 32, 64, 64, 128, 128),
    encoder_block_out_channels=(16, 32, 64, 64, 128, 128),
    attention_head_dim=32,
)


@torch.no_grad()
def errors() -> list[dict[str, Any]]:
    """Of sana-tiny and of random weights, each with calibrated scales and without."""
    return [_bundled(), *(_random(calibrated) for calibrated in (True, False))]


def _bundled() -> dict[str, Any]:
    exact = load_decoder(resolve("sana-tiny"), device=CPU, dtype=torch.float32)
    model = load_decoder(resolve("sana-tiny", int8=True), device=CPU, dtype=torch.bfloat16)
    latents = _latents(4, 8) / exact.config.scaling_factor
    return _row("sana-tiny", True, exact.decode(latents), cast(Autoencoder, model), latents)


def _random(calibrated: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Autoencoder(SHAPES, encoder=False).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    latents = _latents(2, 4)
    pixels = model.decode(latents.clone())
    scales = static_scales(model, decoder_targets(model), lambda: model.decode(latents.clone()))
    quantize_decoder(model, input_scales=scales if calibrated else None)
    return _row("random DC-AE", calibrated, pixels, model.bfloat16(), latents)


def _row(name: str, calibrated: bool, pixels: Tensor, model: Autoencoder, latents: Tensor) -> dict[str, Any]:
    found = {"unfused": model.decode(latents.bfloat16()).float()}
    found["fused"] = fuse_decoder(model, "torch").decode(latents.bfloat16()).float()
    return {
        "decoder": name,
        "calibrated": calibrated,
        "error": {kind: relative_error(each, pixels) for kind, each in found.items()},
        "psnr": {kind: _psnr(each, pixels) for kind, each in found.items()},
    }


def _latents(count: int, side: int) -> Tensor:
    return torch.randn(count, 32, side, side, generator=torch.Generator().manual_seed(3))


def _psnr(x: Tensor, y: Tensor) -> float:
    """In dB, of pixels in levels of 255; what is not within -1 to 1 is clipped."""
    a, b = (((t + 1) / 2 * 255).round().clamp(0, 255) for t in (x, y))
    return 10 * math.log10(255**2 / float((a - b).square().mean()))
