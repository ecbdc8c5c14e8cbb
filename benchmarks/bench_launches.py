"""How many launches a decode takes on a GPU, and an encode, by name, counted without one.

    python benchmarks/bench_launches.py --sizes 512,1024
    python benchmarks/bench_launches.py --errors --before old.json

INT8 networks of the public models' shapes, with calibrated scales and without, as the runtime loads them
where the CUDA library is: see works/schedules.py. ``--before`` takes the rows of another run, such as that of
an older commit, into the file as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import needs

needs("torch", "safetensors")

import torch

from harness.results import ended, output_for, sizes
from harness.study_tables import launches as table
from sana_edge.bench.results import header, write_json
from sana_edge.config import LATENT_CELL
from sana_edge.fused.decoder import fuse_decoder, fuse_encoder
from sana_edge.store.architectures import DC_AE, DC_AE_LITE
from works.decoder_errors import errors
from works.schedules import launches
from works.stages import DTYPE, META, int8_decoder, int8_encoder

DECODERS = {"DC-AE": DC_AE, "DC-AE-Lite": DC_AE_LITE}
# which is never calibrated
ENCODER = "DC-AE's encoder"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the results: 0, 1 for an error, 2 for usage."""
    given = sys.argv[1:] if argv is None else list(argv)
    return ended(lambda: _run(_options(given), given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    output = output_for(options, "bench_launches")
    kinds = [(name, calibrated) for name in DECODERS for calibrated in (True, False)]
    rows = [counted(*kind, size) for kind in (*kinds, (ENCODER, False)) for size in options.sizes]
    data = {**header("benchmarks/bench_launches.py", given), "rows": rows}
    if options.errors:
        data["errors"] = errors()
    if options.before:
        earlier = json.loads(options.before.read_text(encoding="utf-8"))
        data["before"] = {key: earlier[key] for key in ("commit", "rows", "errors") if key in earlier}
    write_json(output, data)
    print(table(data).text())
    print(output)


def counted(name: str, calibrated: bool, size: int) -> dict[str, Any]:
    """One network's launches for a picture with sides of ``size`` pixels."""
    if name == ENCODER:
        encoder = fuse_encoder(int8_encoder(DC_AE))
        pixels = torch.empty(1, 3, size, size, dtype=DTYPE, device=META)
        found = launches(lambda: encoder(pixels.contiguous(memory_format=torch.channels_last)))
    else:
        model = fuse_decoder(int8_decoder(DECODERS[name], calibrated))
        shape = (1, model.config.latent_channels, size // LATENT_CELL, size // LATENT_CELL)
        latent = torch.empty(shape, dtype=DTYPE, device=META)
        found = launches(lambda: model.decode(latent))
    return {
        "decoder": name,
        "size": size,
        "calibrated": calibrated,
        "launches": sum(found.values()),
        "by_name": found,
    }


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_launches.py", description="Count a decode's launches.")
    add = parser.add_argument
    add("--sizes", type=sizes, default=[512, 1024], metavar="PX,PX", help="of pictures (default: 512,1024)")
    add("--errors", action="store_true", help="also how far fused decoders are from float ones")
    add("--before", type=Path, metavar="FILE", help="results of another commit")
    add("--output", type=Path, metavar="FILE", help="(default: in results/)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
