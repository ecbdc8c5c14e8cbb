"""A whole model folder in full size with random weights, to measure what loading and quantizing it takes.

    python benchmarks/random_model.py random-0.6b --shapes 0.6b
    python benchmarks/random_model.py random-sprint-0.6b --shapes 0.6b --sprint
    python benchmarks/random_model.py random-0.6b-int8 --package-of random-0.6b
    python benchmarks/random_model.py onnx-taesana --graphs-of onnx --decoder taesana

Pictures from it are noise; what is written, and how, says `sana_edge.bench.random_model`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import needs

needs("torch", "transformers", "safetensors")

from harness.results import ended, positive
from sana_edge.bench.random_model import write_graphs, write_model, write_package
from sana_edge.bench.shapes import DECODERS, DENOISERS
from sana_edge.store.architectures import GEMMA_2_2B
from sana_edge.torch_runtime.device import DTYPES


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the folder: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    options = _options(sys.argv[1:] if argv is None else argv)
    return ended(lambda: _write(options))


def _write(options: argparse.Namespace) -> None:
    if options.graphs_of:
        write_graphs(options.graphs_of, options.output, options.shapes, options.decoder, force=options.force)
    elif options.package_of:
        write_package(options.package_of, options.output, force=options.force)
    else:
        write_model(
            options.output,
            options.shapes,
            # as most public ones
            dtype=DTYPES[options.dtype or ("bf16" if options.sprint else "fp16")],
            text_layers=options.text_layers,
            text_width=DENOISERS[options.shapes].caption_channels,
            force=options.force,
            sprint=options.sprint,
            device=options.device,
            layers=options.layers,
        )
    print(options.output)


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="random_model.py", description="Write a model with random weights.")
    add = parser.add_argument
    add("output", type=Path)
    add("--package-of", type=Path, metavar="DIR", help="the INT8 package of this float folder instead")
    add("--graphs-of", type=Path, metavar="DIR", help="this exported folder instead, with another --decoder")
    add("--decoder", choices=sorted(DECODERS), default="taesana", help="(default: %(default)s)")
    add("--shapes", choices=sorted(DENOISERS), default="0.6b")
    add("--sprint", action="store_true", help="a Sprint model: 2 steps without guidance")
    add("--dtype", choices=sorted(DTYPES), help="(default: fp16, bf16 with --sprint)")
    add("--layers", type=positive, metavar="N", help="the denoiser's first N only (default: all)")
    add("--text-layers", type=int, default=GEMMA_2_2B["num_hidden_layers"])
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where weights are drawn")
    add("--force", action="store_true", help="replace the folder")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
