"""``sana-edge export``: its options, its progress and what it prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sana_edge.cli.arguments import add_revision, size
from sana_edge.errors import export_extra, one_line
from sana_edge.progress import bar

if TYPE_CHECKING:
    from sana_edge.store.manifest import Manifest

DYNAMIC = "dynamic"


HELP = "make ONNX graphs that run without torch"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""

    def size_or_any(text: str) -> tuple[int, int] | None:
        return None if text == DYNAMIC else size(text)

    add = parser.add_argument
    add("model", metavar="MODEL", help="a name from `models list`, a folder or a repository")
    add("--output", type=Path, required=True, metavar="DIR", help="the folder of graphs, which is made")
    add("--int8", action="store_true", help="INT8: the bundled package, or a package, which is INT8 anyway")
    dtypes = "what the denoiser computes in where it is not INT8 (default: %(default)s, which runs anywhere)"
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help=dtypes)
    sizes = f"of the pictures, if the graphs need to know only one (default: {DYNAMIC}, any size)"
    add("--size", type=size_or_any, metavar=f"WxH|{DYNAMIC}", help=sizes)
    add("--encoder", action="store_true", help="also the encoder, which `generate --image` needs")
    add("--no-verify", action="store_true", help="do not run the graphs beside the model")
    add("--force", action="store_true", help="replace an exported folder at DIR")
    add("--offline", action="store_true", help="never use the network")
    add_revision(parser)


def run(arguments: argparse.Namespace) -> None:
    """Export, say on stderr how far the graphs are from the model, and print the folder."""
    from sana_edge.export.settings import Settings

    # what is wrong shows here, before torch is loaded
    settings = Settings(
        dtype=arguments.dtype,
        size=arguments.size,
        int8=arguments.int8,
        encoder=arguments.encoder,
        verify=not arguments.no_verify,
    )
    with export_extra():
        from sana_edge.export.onnx import export
    with bar(arguments.quiet) as progress:
        made = export(
            arguments.model,
            arguments.output,
            settings,
            offline=arguments.offline,
            revision=arguments.revision,
            force=arguments.force,
            progress=None if arguments.quiet else progress,
        )
    if not arguments.quiet:
        for note in made.notes:
            print(f"note:  {one_line(note)}", file=sys.stderr)
        print("\n".join(map(one_line, _summary(made).split("\n"))), file=sys.stderr)
    print(arguments.output)


def _summary(made: Manifest) -> str:
    """One line of what was made, and how far it is from the model."""
    size = sum(file.bytes for file in made.files.values())
    what = f"{made.name}, {made.quantization or made.dtype}: {size / 1e6:.0f} MB"
    found = made.verification
    if found is None:
        return f"{what}, not compared with the model"
    name, worst = max(found["graphs"].items(), key=lambda pair: float(pair[1]["error"]))
    return (
        f"{what}; compared with the model: relative L2 at most {worst['error']:.1e} ({name}), "
        f"picture's PSNR {found['picture']['psnr']:.1f} dB"
    )
