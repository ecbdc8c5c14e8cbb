"""Runs every graph of an exported folder in onnxruntime beside the torch modules, in fp32 on the CPU.

    python -m sana_edge.export.verify.compare DIR --model MODEL

Prompts and noise are fixed. One torch network is in memory at a time, and one graph.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from sana_edge.errors import SanaError
from sana_edge.export.verify.agreement import Agreement
from sana_edge.export.verify.decoder import Decoding
from sana_edge.export.verify.denoiser import Denoising
from sana_edge.export.verify.encoder import compare_encoder
from sana_edge.export.verify.runner import GraphRunner
from sana_edge.export.verify.text import compare_text
from sana_edge.store import hub, manifest
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.manifest import ENCODER, Manifest

# pixels of a side where the graphs take any size
SIDE = 256


@torch.inference_mode()
def compare(
    folder: Path, model: ResolvedModel, described: Manifest | None = None, *, threads: int = 0
) -> dict[str, Any]:
    """Compare the graphs with the model that they were made of.

    Text encoder, text projection, denoiser and decoder, whole and in parts, run on the same inputs as the
    torch modules; then a picture of a few steps is made by the graphs alone.

    Args:
        described: the folder's manifest, read from the folder if None.
        threads: of onnxruntime; 0 lets it choose.

    Returns:
        JSON values: "onnxruntime", its version; "size" of the pictures, [W, H]; "graphs", by name the worst
        relative error in L2, the largest difference as a share of the largest value, and the limit of the
        error; of INT8 models the same as "unrounded", where activations are not rounded to INT8 on either
        side; "picture", its PSNR in dB (99 if equal) and its limit.

    Raises:
        SanaError: a graph differs from its module by more than its dtype explains (see
            `sana_edge.export.verify.agreement`), or the pictures do; names graph and figure.
        CheckpointError: a file of the folder or the model is missing or damaged.
    """
    described = described or manifest.read(folder)
    int8 = described.quantization is not None
    agreement, unrounded = Agreement(described.dtype, int8), Agreement(described.dtype, False)
    width, height = described.size or (min(described.native_size, SIDE),) * 2
    size = height // described.cell, width // described.cell
    with GraphRunner(folder, described.graphs, threads) as graphs:
        texts = compare_text(folder, described, model, graphs, agreement)
        if int8:
            graphs.rounded = False
            latent = Denoising(model, described, graphs, unrounded, size).compare(texts)
            Decoding(model, described, graphs, unrounded).compare(latent)
            graphs.rounded = True
        denoising = Denoising(model, described, graphs, agreement, size)
        latent, latents = denoising.compare(texts), denoising.picture(texts)
        del denoising
        decoding = Decoding(model, described, graphs, agreement)
        decoding.compare(latent)
        picture = decoding.picture(latents)
        if ENCODER in described.graphs:
            del decoding
            compare_encoder(model, graphs, agreement)
    found: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "size": [width, height]}
    if int8:
        found["unrounded"] = unrounded.graphs
    return {**found, "graphs": agreement.graphs, "picture": picture}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print what `compare` returns; 1 where it raises."""
    parser = argparse.ArgumentParser(prog="python -m sana_edge.export.verify.compare", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `sana-edge export` made")
    parser.add_argument("--model", required=True, help="what it was made of")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime (default: it chooses)")
    given = parser.parse_args(arguments)
    try:
        described = manifest.read(given.folder)
        model = hub.resolve(given.model, int8=described.quantization is not None)
        print(json.dumps(compare(given.folder, model, described, threads=given.threads), indent=1))
    except SanaError as error:
        print(f"error: {error.message}", error.hint, sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
